//! What a caller can get wrong is an error that names the argument, before anything is recorded.
use testkit::{cases, prelude::*};
use wgmoe::ops::expert_choice::{self, ExpertChoice};
use wgmoe::ops::gather::{self, Gather};
use wgmoe::ops::plan_count::{self, PlanCount};
use wgmoe::ops::scores::{self, Scores};
use wgmoe::ops::token_choice::{self, TokenChoice};
use wgmoe::ops::{assign, combine, expert_union};
use wgmoe::plan::bits;
use wgmoe::routing::Groups;
use wgmoe::wgpu::{self, BufferUsages};
use wgmoe::{Context, Error, Gpu, PlanShape, Score, Slice, Variant};

/// The message of a result that must be an error.
#[track_caller]
fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("must be an error"),
        Err(e) => e.to_string(),
    }
}

fn context(gpu: &Gpu) -> Context {
    contexts(gpu)[0].clone()
}

fn f32s(gpu: &Gpu, len: usize) -> wgpu::Buffer {
    gpu.upload(&vec![0.0f32; len])
}

/// A gather of 4 tokens of 8 elements into 2 slots.
fn bind(
    ctx: &Context,
    x: Slice<'_>,
    token_of: Slice<'_>,
    out: Slice<'_>,
) -> wgmoe::Result<wgmoe::BoundOp> {
    let dims = gather::Dims { tokens: 4, slots: 2, hidden: 8 };
    Gather::new(ctx)?.bind(&dims, gather::Args { x: x.into(), token_of, out })
}

#[test]
fn slices_that_do_not_fit() {
    let Some(gpu) = gpu() else { return };
    let ctx = context(&gpu);
    let (x, of, out) = (f32s(&gpu, 32), gpu.upload(&[0u32, 1]), f32s(&gpu, 16));
    let good = || ((&x).into(), (&of).into(), (&out).into());
    let (a, b, c) = good();
    bind(&ctx, a, b, c).unwrap();

    let short = Slice::new(&x, 0, 124);
    assert_eq!(message(bind(&ctx, short, b, c)), "`x`: expected 128 bytes, [4, 8] f32, got 124");
    assert_eq!(
        message(bind(&ctx, a, Slice::new(&of, 0, 12), c)),
        "`token_of`: expected 8 bytes, [2] u32, got 12"
    );
    assert_eq!(
        message(bind(&ctx, a, b, (&x).into())),
        "`out`: expected 64 bytes, [2, 8] f32, got 128"
    );
    assert_eq!(
        message(bind(&ctx, a, b, Slice::new(&out, 256, 64))),
        "`out`: bytes 256..320 of a buffer of 64"
    );
    let far = Slice::new(&out, u64::MAX - 3, 64);
    assert!(message(bind(&ctx, a, b, far)).starts_with("`out`: bytes 18446744073709551612.."));

    let long = f32s(&gpu, 1024);
    let alignment = u64::from(ctx.limits().min_storage_buffer_offset_alignment);
    let offset = alignment / 2;
    assert_eq!(
        message(bind(&ctx, Slice::new(&long, offset, 128), b, c)),
        format!("`x`: offset {offset} is not a multiple of {alignment}")
    );
    let bare = gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 64,
        usage: BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    assert_eq!(message(bind(&ctx, a, b, (&bare).into())), "`out`: the buffer lacks STORAGE");
}

#[test]
fn slices_that_overlap() {
    let Some(gpu) = gpu() else { return };
    let ctx = context(&gpu);
    let (of, all) = (gpu.upload(&[0u32, 1]), f32s(&gpu, 1024));
    let x = Slice::new(&all, 0, 128);
    assert_eq!(
        message(bind(&ctx, x, (&of).into(), Slice::new(&all, 0, 64))),
        "`out` is written and overlaps `x`"
    );
    let dims = scores::Dims { tokens: 4, experts: 8, score: Score::Softmax, by_logits: true };
    let logits = f32s(&gpu, 32);
    let args = scores::Args { logits: (&logits).into(), bias: None, scores: x, values: x };
    let op = Scores::new(&ctx).unwrap();
    assert_eq!(message(op.bind(&dims, args)), "`scores` is written and overlaps `values`");
}

#[test]
fn slices_of_one_buffer() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        // Everything in one buffer, poisoned, each tensor at an aligned offset.
        let whole = gpu.upload(&vec![u32::MAX; 16 * 1024]);
        let put = |at: u64, bytes: &[u8]| {
            gpu.queue.write_buffer(&whole, at, bytes);
            Slice::new(&whole, at, bytes.len() as u64)
        };
        let read = |s: Slice<'_>| -> Vec<u32> {
            let all: Vec<u32> = gpu.download(&whole).unwrap();
            assert_eq!(all[s.offset as usize / 4 - 1], u32::MAX, "the word before");
            assert_eq!(all[(s.offset + s.size) as usize / 4], u32::MAX, "the word behind");
            all[s.offset as usize / 4..][..s.size as usize / 4].to_vec()
        };
        let floats = |words: Vec<u32>| words.into_iter().map(f32::from_bits).collect::<Vec<f32>>();

        let x = cases::values("random", 1, 70 * 6);
        let token_of = [69u32, 0, 70, 3];
        let args = gather::Args {
            x: put(0, bytemuck::cast_slice(&x)).into(),
            token_of: put(2048, bytemuck::cast_slice(&token_of)),
            out: Slice::new(&whole, 4096, 96),
        };
        let dims = gather::Dims { tokens: 70, slots: 4, hidden: 6 };
        run(&gpu, &Gather::new(&ctx).unwrap().bind(&dims, args).unwrap());
        assert_same(&floats(read(args.out)), &gather::cpu(&x, 6, &token_of), "gather");

        let args = scores::Args {
            logits: args.x.slice,
            bias: None,
            scores: Slice::new(&whole, 8192, 1680),
            values: Slice::new(&whole, 12_288, 1680),
        };
        let dims = scores::Dims { tokens: 70, experts: 6, score: Score::Softmax, by_logits: true };
        let op = Scores::new(&ctx).unwrap();
        run(&gpu, &op.bind(&dims, args).unwrap());
        let (s, r) = scores::cpu(&x, 6, Score::Softmax, true, None);
        assert_close(&floats(read(args.scores)), &s, 2e-38, 2e-6, "scores");
        assert_same(&floats(read(args.values)), &r, "scores");

        let args = token_choice::Args {
            experts_per_token: None,
            values: args.values,
            coresets: None,
            assigned: Slice::new(&whole, 16_384, 72),
        };
        let op = TokenChoice::new(&ctx, 6, 2, None).unwrap();
        run(&gpu, &op.bind(&token_choice::Dims { tokens: 70 }, args).unwrap());
        assert_same(
            &read(args.assigned),
            &token_choice::cpu(&x, 6, 2, None, &|_, _| true),
            "token_choice",
        );

        let args = expert_choice::Args {
            values: args.values,
            offsets: put(20_480, bytemuck::cast_slice(&[0u32, 33, 70])),
            lengths: None,
            capacity: put(24_576, bytemuck::cast_slice(&[5u32, 7])),
            assigned: Slice::new(&whole, 28_672, 72),
        };
        let dims = expert_choice::Dims { tokens: 70, experts: 6, sequences: 2 };
        run(&gpu, &ExpertChoice::new(&ctx).unwrap().bind(&dims, args).unwrap());
        let want = expert_choice::cpu(&x, 6, &[0, 33, 70], None, &[5, 7]);
        assert_same(&read(args.assigned), &want, "expert_choice");

        let shape = PlanShape::on_host(70, 6, 72).with_item_rows(16, 0);
        let plan = Slice::new(&whole, 32_768, shape.bytes().unwrap());
        let args = plan_count::Args { assigned: args.assigned, gates: None, plan };
        run(&gpu, &PlanCount::new(&ctx).unwrap().bind(&shape, args).unwrap());
        let at = shape.sections().unwrap().expert_offsets as usize;
        let counts: Vec<u32> = (0..6).map(|e| bits::tokens_of(&want, 70, e).len() as u32).collect();
        assert_same(&read(plan)[at..at + 6], &counts, "plan_count");
    }
}

#[test]
fn dimensions_that_make_no_sense() {
    let Some(gpu) = gpu() else { return };
    let ctx = context(&gpu);
    let b = f32s(&gpu, 64);
    let all: Slice<'_> = (&b).into();

    let new = |experts, top, groups| message(TokenChoice::new(&ctx, experts, top, groups));
    assert_eq!(new(0, 1, None), "`experts`: must not be 0");
    assert_eq!(new(1025, 1, None), "`experts`: 1025, at most 1024");
    assert_eq!(new(8, 0, None), "`experts_per_token`: must not be 0");
    assert_eq!(new(8, 9, None), "`experts_per_token`: 9 of only 8 experts");
    assert_eq!(new(256, 65, None), "`experts_per_token`: 65, at most 64");
    let groups = |count, top| Some(Groups::new(count, top));
    assert_eq!(new(8, 2, groups(3, 1)), "`groups`: 3 do not divide 8 experts");
    assert_eq!(new(64, 2, groups(64, 1)), "`groups`: 64, must be 1 to 32");
    assert_eq!(new(8, 2, groups(4, 5)), "`groups`: 5 of only 4 groups");
    assert_eq!(new(8, 2, groups(0, 1)), "`groups`: 0, must be 1 to 32");
    assert_eq!(new(8, 2, groups(4, 0)), "`groups`: a token must be allowed at least 1");
    assert_eq!(
        new(16, 4, groups(8, 1)),
        "`experts_per_token`: 4 of only 2 experts, those of 1 of 8 groups"
    );

    let args = scores::Args { logits: all, bias: None, scores: all, values: all };
    let dims = scores::Dims { tokens: 1, experts: 0, score: Score::Softmax, by_logits: true };
    assert_eq!(message(Scores::new(&ctx).unwrap().bind(&dims, args)), "`experts`: must not be 0");
    let args = expert_choice::Args {
        values: all,
        offsets: all,
        lengths: None,
        capacity: all,
        assigned: all,
    };
    let op = ExpertChoice::new(&ctx).unwrap();
    let dims = |experts, sequences| expert_choice::Dims { tokens: 1, experts, sequences };
    assert_eq!(message(op.bind(&dims(0, 1), args)), "`experts`: must not be 0");
    assert_eq!(message(op.bind(&dims(1, 0), args)), "`sequences`: must not be 0");
    let args = gather::Args { x: all.into(), token_of: all, out: all };
    let op = Gather::new(&ctx).unwrap();
    let dims = |tokens, hidden| gather::Dims { tokens, slots: 1, hidden };
    assert_eq!(message(op.bind(&dims(1, 0), args)), "`hidden`: must not be 0");
    assert_eq!(message(op.bind(&dims(0, 1), args)), "`tokens`: must not be 0");
    let args = assign::Args { ids: all, weights: all, assigned: all, gates: all, ignored: all };
    let dims = assign::Dims { tokens: 1, experts: 1, experts_per_token: 0 };
    assert_eq!(
        message(assign::Assign::new(&ctx).unwrap().bind(&dims, args)),
        "`experts_per_token`: must not be 0"
    );
    let args = expert_union::Args {
        assigned: all,
        offsets: all,
        members: all,
        counts: all,
        bytes: all,
        totals: None,
    };
    let dims = expert_union::Dims { tokens: 1, experts: 2000, blocks: 1, expert_bytes: 1 };
    let op = expert_union::ExpertUnion::new(&ctx).unwrap();
    assert_eq!(message(op.bind(&dims, args)), "`experts`: 2000, at most 1024");

    let shape = |tokens, experts, shared_experts, tile_rows| {
        let shape = PlanShape::on_host(tokens, experts, 1).with_item_rows(tile_rows, 0);
        shape.with_shared_experts(shared_experts)
    };
    assert_eq!(message(shape(0, 1, 0, 1).bytes()), "`tokens`: must not be 0");
    assert_eq!(message(shape(1, 0, 0, 1).bytes()), "`experts`: must not be 0");
    assert_eq!(message(shape(1, 1, 0, 0).bytes()), "`tile_rows`: must not be 0");
    assert_eq!(message(shape(1, 1, 1025, 1).bytes()), "`shared_experts`: 1025, at most 1024");
    assert_eq!(message(shape(1, 1025, 0, 1).bytes()), "`experts`: 1025, at most 1024");
    let args =
        combine::Args { y: all, plan: all, out: all.into(), columns: 3..3, hidden: 4, add: false };
    let op = combine::Combine::new(&ctx).unwrap();
    assert_eq!(message(op.bind(&shape(1, 1, 0, 1), args.clone())), "`columns`: 3..3 of 4");
    let args = combine::Args { columns: 2..5, ..args };
    assert_eq!(message(op.bind(&shape(1, 1, 0, 1), args)), "`columns`: 2..5 of 4");
}

#[test]
fn sizes_at_the_end_of_32_bits() {
    use wgmoe::weights::ExpertShape;
    use wgmoe::{WeightType, models, routing};
    // 2^32 / 1, cut to the tokens; not to what is left of it in 32 bits.
    assert_eq!(routing::schedule::capacity(1 << 16, 1 << 16, 1), 1 << 16);
    let weight_type = WeightType::F32;
    let shape = ExpertShape::new(1, 1, u32::MAX, weight_type);
    assert_eq!(shape.device_bytes(), 2 * (16 << 32) + 32 * 16 * (1 << 30));
    let shape = ExpertShape::new(1, u32::MAX, u32::MAX, weight_type);
    assert_eq!([shape.expert_bytes(), shape.device_bytes()], [u64::MAX; 2]);
    let config = models::find("llada2-mini").unwrap().config;
    let many = config.with_shared_experts(u32::MAX);
    assert_eq!(many.expert_shape(weight_type).experts, u32::MAX);
}

#[test]
fn products_that_overflow() {
    let Some(gpu) = gpu() else { return };
    let ctx = context(&gpu);
    let b = f32s(&gpu, 64);
    let all: Slice<'_> = (&b).into();
    let args = gather::Args { x: all.into(), token_of: all, out: all };
    let dims = gather::Dims { tokens: u32::MAX, slots: 1, hidden: u32::MAX };
    let text = message(Gather::new(&ctx).unwrap().bind(&dims, args));
    assert_eq!(text, "`x`: [4294967295, 4294967295] overflows");
    let shape = |tokens, shared_experts, skinny_rows| {
        let shape = PlanShape::on_host(tokens, 1, u32::MAX).with_item_rows(16, skinny_rows);
        shape.with_shared_experts(shared_experts)
    };
    assert_eq!(
        message(shape(u32::MAX, 1, 0).slots()),
        "`tokens`: too many slots: shared experts times tokens overflow"
    );
    assert_eq!(message(shape(1, 0, 0).sections()), "`tokens`: the plan would not fit 2^32 words");
    let tiny = shape(1, 0, 0).with_item_rows(1, 0);
    assert_eq!(message(tiny.tiles()), "`tokens`: too many slots: their tiles overflow");
    // The ends of the number range are errors too, not panics.
    assert!(shape(u32::MAX, u32::MAX, u32::MAX).sections().is_err());
    assert!(shape(1, 0, u32::MAX).sections().is_err());
    assert!(shape(1, u32::MAX, u32::MAX).tiles().is_err());
    assert!(shape(1, u32::MAX, u32::MAX).skinny().is_err());
}

#[test]
fn more_than_the_device_binds() {
    // wgpu's noop backend has WebGPU's default limits: 128 MiB a binding, 256 MiB a buffer.
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let buffer = |size| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    let (big, of, out) = (buffer(129 << 20), buffer(8), buffer(2 << 20));
    let dims = gather::Dims { tokens: 129, slots: 2, hidden: 1 << 18 };
    let args = gather::Args { x: (&big).into(), token_of: (&of).into(), out: (&out).into() };
    assert_eq!(
        message(Gather::new(&ctx).unwrap().bind(&dims, args)),
        "`x`: 135266304 needed, max_storage_buffer_binding_size of this device is 134217728"
    );
}

#[test]
fn a_feature_that_the_device_lacks() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let variant = Variant { subgroups: true, ..Variant::PORTABLE };
    let error = Context::with_variant(&device, variant).unwrap_err();
    assert_eq!(error, Error::Feature { missing: wgpu::Features::SUBGROUP });
    assert_eq!(error.to_string(), "the device lacks SUBGROUP");
    let missing = wgpu::Features::SUBGROUP | wgpu::Features::SHADER_F16;
    let error = Error::Feature { missing };
    assert_eq!(error.to_string(), "the device lacks SUBGROUP and SHADER_F16");
}

#[test]
fn a_destroyed_buffer() {
    let Some(gpu) = gpu() else { return };
    let ctx = context(&gpu);
    let (x, of, out) = (f32s(&gpu, 32), gpu.upload(&[0u32, 1]), f32s(&gpu, 16));
    let step = bind(&ctx, (&x).into(), (&of).into(), (&out).into()).unwrap();
    x.destroy();
    let text = message(bind(&ctx, (&x).into(), (&of).into(), (&out).into()));
    assert!(text.starts_with("wgpu: `x`: ") && text.contains("destroyed"), "{text}");
    // Destroyed after it was bound: the submission is refused.
    let text = message(gpu.run(&step));
    assert!(text.starts_with("wgpu: ") && text.contains("destroyed"), "{text}");
    let text = message(gpu.download::<f32>(&x));
    assert!(text.contains("destroyed"), "{text}");
}

#[test]
fn a_buffer_of_another_device() {
    if gpu().is_none() {
        return;
    }
    // Of one instance: the buffers of another instance have names that wgpu takes for its own, which nobody can tell.
    let adapters = pollster::block_on(Gpu::adapters());
    let [gpu, other] =
        [(); 2].map(|()| pollster::block_on(Gpu::from_adapter(&adapters[0])).unwrap());
    let ctx = Context::new(&gpu.device).unwrap();
    let (x, of, out) = (f32s(&other, 32), gpu.upload(&[0u32, 1]), f32s(&gpu, 16));
    let text = message(bind(&ctx, (&x).into(), (&of).into(), (&out).into()));
    assert!(text.starts_with("wgpu: `x`: ") && text.to_lowercase().contains("device"), "{text}");
}

#[test]
fn a_lost_device() {
    if gpu().is_none() {
        return;
    }
    let gpu = Gpu::new().unwrap();
    let ctx = Context::new(&gpu.device).unwrap();
    let (x, of, out) = (f32s(&gpu, 32), gpu.upload(&[0u32, 1]), f32s(&gpu, 16));
    let step = bind(&ctx, (&x).into(), (&of).into(), (&out).into()).unwrap();
    run(&gpu, &step);
    gpu.device.destroy();
    for text in [
        message(bind(&ctx, (&x).into(), (&of).into(), (&out).into())),
        message(gpu.run(&step)),
        message(gpu.download::<f32>(&out)),
        message(Scores::new(&ctx)),
        message(Context::new(&gpu.device)),
    ] {
        assert!(text.contains("lost") || text.contains("destroyed"), "{text}");
    }
}
