//! Sizes near those at which software drivers end a kernel's loops without a word: results are right up
//! to there, and past it `bind` says so.
use testkit::{cases, prelude::*};
use wgmoe::ops::{
    assign, assign_lists, capacity, coreset, expert_choice, expert_union, logits, plan_scan,
    sequence_top,
};
use wgmoe::plan::bits;
use wgmoe::{BlockRule, BoundOp, Context, Error, Gpu, PlanShape, Target, wgpu};

/// Every layout of the work; subgroups make no difference to these kernels.
fn layouts(gpu: &Gpu) -> Vec<Context> {
    contexts(gpu).into_iter().filter(|c| !c.variant().subgroups).collect()
}

/// Fails unless a software driver gets an error that names the argument and its value. Others have no
/// such limit.
#[track_caller]
fn refuses(gpu: &Gpu, bound: Result<BoundOp, Error>, argument: &str, value: usize) {
    if gpu.info.device_type != wgpu::DeviceType::Cpu {
        return;
    }
    let text = bound.expect_err("more than the loops can do").to_string();
    let start = format!("`{argument}`: {value}: one invocation could loop ");
    assert!(text.starts_with(&start), "{text}");
}

struct Choice<'a> {
    r: &'a [f32],
    experts: usize,
    offsets: &'a [u32],
    capacity: &'a [u32],
}

impl Choice<'_> {
    fn tokens(&self) -> usize {
        self.r.len() / self.experts
    }

    fn bind(&self, gpu: &Gpu, ctx: &Context, assigned: &Output) -> Result<BoundOp, Error> {
        let (r, offsets) = (gpu.upload(self.r), gpu.upload(self.offsets));
        let capacity = gpu.upload(self.capacity);
        let args = expert_choice::Args {
            values: (&r).into(),
            offsets: (&offsets).into(),
            lengths: None,
            capacity: (&capacity).into(),
            assigned: assigned.slice(),
        };
        let dims = expert_choice::Dims {
            tokens: self.tokens() as u32,
            experts: self.experts as u32,
            sequences: self.capacity.len() as u32,
        };
        expert_choice::ExpertChoice::new(ctx)?.bind(&dims, args)
    }

    fn output(&self, gpu: &Gpu) -> Output {
        let words = self.experts * bits::columns(self.tokens());
        Output::holding(gpu, &cases::stale(1, words))
    }

    #[track_caller]
    fn check(&self, gpu: &Gpu, what: &str) {
        let want = expert_choice::cpu(self.r, self.experts, self.offsets, None, self.capacity);
        for ctx in layouts(gpu) {
            let assigned = self.output(gpu);
            let start = std::time::Instant::now();
            run(gpu, &self.bind(gpu, &ctx, &assigned).expect("within the limit"));
            let what = format!("{} {what}", variant_name(&ctx));
            println!("{what}: {:.2} s", start.elapsed().as_secs_f64());
            assert_same(&assigned.get::<u32>(gpu), &want, &what);
        }
    }
}

#[test]
fn expert_choice_of_very_long_sequences() {
    let Some(gpu) = gpu() else { return };
    let tokens = 680_000;
    for kind in ["random", "mixed", "equal"] {
        let r = cases::values(kind, 5, tokens);
        for capacity in [300_000, 1] {
            let offsets = [0, tokens as u32];
            Choice { r: &r, experts: 1, offsets: &offsets, capacity: &[capacity] }
                .check(&gpu, &format!("{kind} C {capacity}"));
        }
    }
    let tokens = 700_000;
    let r = vec![0.0; tokens];
    let choice = Choice { r: &r, experts: 1, offsets: &[0, 5], capacity: &[5] };
    for ctx in layouts(&gpu) {
        let assigned = choice.output(&gpu);
        refuses(&gpu, choice.bind(&gpu, &ctx, &assigned), "tokens", tokens);
        let [offsets, capacity] = [gpu.upload(&[0, tokens as u32]), gpu.upload(&[7u32, 0])];
        let (gates, dropped) = (gpu.upload(&r), Output::u32s(&gpu, 1));
        let args = expert_choice::DropArgs {
            gates: (&gates).into(),
            offsets: (&offsets).into(),
            capacity: wgmoe::Slice::new(&capacity, 0, 4),
            assigned: assigned.slice(),
            dropped: dropped.slice(),
        };
        let op = expert_choice::ExpertChoice::new(&ctx).unwrap();
        refuses(
            &gpu,
            op.bind_drop(&expert_choice::DropDims { tokens: tokens as u32, experts: 1 }, args),
            "tokens",
            tokens,
        );
    }
}

/// Short sequences among long ones: on software drivers each kind has its own kernel, which must leave
/// the other's words alone.
#[test]
fn expert_choice_of_long_and_short_sequences() {
    let Some(gpu) = gpu() else { return };
    let lengths = [7, 0, 110_000, 40, 0, 25, 101_000, 3, 64, 0];
    let mut offsets = vec![5];
    offsets.extend(lengths.iter().scan(5, |at, n| {
        *at += n;
        Some(*at)
    }));
    let tokens = offsets[lengths.len()] as usize + 70;
    for kind in ["random", "ties"] {
        let r = cases::values(kind, 9, tokens * 3);
        let capacity = lengths.map(|n| n / 3 + 1);
        Choice { r: &r, experts: 3, offsets: &offsets, capacity: &capacity }.check(&gpu, kind);
    }
}

/// Many short sequences of a batch that is too long for one lane.
#[test]
fn expert_choice_of_many_short_sequences() {
    let Some(gpu) = gpu() else { return };
    let (sequences, length) = (1024, 128);
    let offsets: Vec<u32> = (0..=sequences).map(|b| b * length).collect();
    let r = random(3, (sequences * length * 8) as usize);
    let capacity = vec![30; sequences as usize];
    Choice { r: &r, experts: 8, offsets: &offsets, capacity: &capacity }.check(&gpu, "many");
}

#[test]
fn capacities_of_very_many_sequences() {
    let Some(gpu) = gpu() else { return };
    let bind = |ctx: &Context, k: &[u32], offsets: &[u32], out: &[Output; 2]| {
        let (k, offsets) = (gpu.upload(k), gpu.upload(offsets));
        let args = capacity::Args {
            source: capacity::Source::ExpertsPerToken((&k).into()),
            offsets: (&offsets).into(),
            lengths: None,
            capacity_of: out[0].slice(),
            k_of: out[1].slice(),
        };
        let sequences = (offsets.size() / 4 - 1) as u32;
        capacity::Capacity::new(ctx)?
            .bind(&capacity::Dims { tokens: 1 << 20, experts: 4, sequences }, args)
    };
    for sequences in [65_400, 65_600, 70_000] {
        let k: Vec<u32> = (0..sequences).map(|b| b % 5).collect();
        let offsets: Vec<u32> = (0..=sequences).map(|b| 9 * b + b % 7).collect();
        let want =
            capacity::cpu(capacity::HostSource::ExpertsPerToken(&k), 1 << 20, 4, &offsets, None);
        for ctx in layouts(&gpu) {
            let out = [0; 2].map(|_| Output::u32s(&gpu, k.len()));
            run(&gpu, &bind(&ctx, &k, &offsets, &out).expect("within the limit"));
            let what = format!("{} {sequences}", variant_name(&ctx));
            assert_same(&out[0].get::<u32>(&gpu), &want.0, &what);
            assert_same(&out[1].get::<u32>(&gpu), &want.1, &what);
        }
    }
    let sequences = 2_100_000;
    for ctx in layouts(&gpu) {
        let out = [0; 2].map(|_| Output::u32s(&gpu, sequences));
        let bound = bind(&ctx, &vec![1; sequences], &vec![0; sequences + 1], &out);
        refuses(&gpu, bound, "sequences", sequences);
    }
}

#[test]
fn assignments_of_very_many_places() {
    let Some(gpu) = gpu() else { return };
    for ctx in layouts(&gpu) {
        for top in [65_000, 66_000] {
            let ids: Vec<u32> =
                (0..top).map(|i| if i + 3 < top { u32::MAX } else { i % 7 }).collect();
            let weights = vec![0.5; ids.len()];
            let (want, _, ignored) = assign::cpu(&ids, &weights, top as usize, 4);
            let (i, w) = (gpu.upload(&ids), gpu.upload(&weights));
            let [assigned, lost] = [4, 1].map(|n| Output::u32s(&gpu, n));
            let gates = Output::f32s(&gpu, 4);
            let args = assign::Args {
                ids: (&i).into(),
                weights: (&w).into(),
                assigned: assigned.slice(),
                gates: gates.slice(),
                ignored: lost.slice(),
            };
            let dims = assign::Dims { tokens: 1, experts: 4, experts_per_token: top };
            let bound = assign::Assign::new(&ctx).unwrap().bind(&dims, args);
            if top == 66_000 {
                refuses(&gpu, bound, "experts_per_token", top as usize);
                continue;
            }
            run(&gpu, &bound.expect("within the limit"));
            assert_same(&assigned.get::<u32>(&gpu), &want, "assigned");
            assert_same(&lost.get::<u32>(&gpu), &ignored, "ignored");
        }
    }
}

#[test]
fn lists_of_very_many_entries() {
    let Some(gpu) = gpu() else { return };
    let tokens = 40;
    // All of one expert; the last are the only ones that count.
    for entries in [4_190_000, 4_200_000] {
        let list: Vec<u32> =
            (0..entries).map(|i| if i + 5 < entries { u32::MAX } else { i % 41 }).collect();
        let (offsets, weights) = ([0, entries], vec![0.5; list.len()]);
        let want = assign_lists::cpu(&offsets, &list, &weights, tokens);
        let (o, l, w) = (gpu.upload(&offsets), gpu.upload(&list), gpu.upload(&weights));
        for ctx in layouts(&gpu) {
            let [assigned, ignored] = [2, 1].map(|n| Output::u32s(&gpu, n));
            let gates = Output::holding(&gpu, &vec![0f32; tokens]);
            let args = assign_lists::Args {
                offsets: (&o).into(),
                list: (&l).into(),
                weights: (&w).into(),
                assigned: assigned.slice(),
                gates: gates.slice(),
                ignored: ignored.slice(),
            };
            let dims = assign_lists::Dims { tokens: tokens as u32, experts: 1, entries };
            let bound = assign_lists::AssignLists::new(&ctx).unwrap().bind(&dims, args);
            if entries == 4_200_000 {
                refuses(&gpu, bound, "entries", entries as usize);
                continue;
            }
            run(&gpu, &bound.expect("within the limit"));
            assert_same(&assigned.get::<u32>(&gpu), &want.0, "assigned");
            assert_same(&gates.get::<f32>(&gpu), &want.1, "gates");
            assert_same(&ignored.get::<u32>(&gpu), &want.2, "ignored");
        }
    }
    // The columns alone are too many.
    let tokens = 32 * 64 * 66_000;
    for ctx in layouts(&gpu) {
        let one = gpu.upload(&[0u32; 2]);
        let all = wgmoe::Slice::from(&one);
        let args = assign_lists::Args {
            offsets: all,
            list: all,
            weights: all,
            assigned: all,
            gates: all,
            ignored: all,
        };
        let dims = assign_lists::Dims { tokens, experts: 1, entries: 1 };
        let bound = assign_lists::AssignLists::new(&ctx).unwrap().bind(&dims, args);
        refuses(&gpu, bound, "tokens", tokens as usize);
    }
}

#[test]
fn unions_of_very_many_tokens_and_blocks() {
    let Some(gpu) = gpu() else { return };
    let bind = |ctx: &Context, assigned: &[u32], dims: expert_union::Dims, out: &[Output; 3]| {
        let offsets: Vec<u32> = (0..=dims.blocks).map(|b| b.min(1) * dims.tokens).collect();
        let (a, o) = (gpu.upload(assigned), gpu.upload(&offsets));
        let args = expert_union::Args {
            assigned: (&a).into(),
            offsets: (&o).into(),
            members: out[0].slice(),
            counts: out[1].slice(),
            bytes: out[2].slice(),
            totals: None,
        };
        expert_union::ExpertUnion::new(ctx)?.bind(&dims, args)
    };
    let of = |tokens, blocks| expert_union::Dims { tokens, experts: 2, blocks, expert_bytes: 3 };
    for tokens in [2_090_000, 2_100_000] {
        // The last token alone has an expert.
        let columns = bits::columns(tokens);
        let mut assigned = vec![0; 2 * columns];
        bits::set(&mut assigned, tokens, 1, tokens - 1);
        for ctx in layouts(&gpu) {
            let out = [1, 1, 2].map(|n| Output::u32s(&gpu, n));
            let bound = bind(&ctx, &assigned, of(tokens as u32, 1), &out);
            if tokens == 2_100_000 {
                refuses(&gpu, bound, "tokens", tokens);
                continue;
            }
            run(&gpu, &bound.expect("within the limit"));
            let got = out.map(|o| o.get::<u32>(&gpu));
            assert_eq!(got, [vec![0b10], vec![1], vec![3, 0]], "{}", variant_name(&ctx));
        }
    }
    let blocks = 16_800_000;
    for ctx in layouts(&gpu) {
        let out = [1, 1, 2].map(|n| Output::u32s(&gpu, n));
        refuses(&gpu, bind(&ctx, &[0; 2], of(32, blocks), &out), "blocks", blocks as usize);
    }
}

#[test]
fn pairs_of_very_many_sequences() {
    let Some(gpu) = gpu() else { return };
    for ctx in layouts(&gpu) {
        let bind = |sequences: u32| {
            let offsets = gpu.upload(&vec![0u32; sequences as usize + 1]);
            let (values, assigned) = (gpu.upload(&[0f32; 3]), gpu.upload(&[0u32; 1]));
            let args = sequence_top::Args {
                values: (&values).into(),
                offsets: (&offsets).into(),
                assigned: (&assigned).into(),
            };
            let dims =
                sequence_top::Dims { tokens: 3, experts: 1, sequences, experts_per_token: 1 };
            sequence_top::SequenceTop::new(&ctx)?.bind(&dims, args)
        };
        bind(2_000).expect("within the limit");
        refuses(&gpu, bind(6_000_000), "sequences", 6_000_000);
    }
}

#[test]
fn plans_of_very_many_rows_of_an_expert() {
    let Some(gpu) = gpu() else { return };
    for ctx in layouts(&gpu) {
        let bind = |tokens: u32, stats: &Output, plan: &Output| {
            let shape = shape(tokens);
            let args = plan_scan::Args {
                lost: None,
                offsets: None,
                plan: plan.slice(),
                stats: stats.slice(),
                add_stats: false,
            };
            plan_scan::PlanScan::new(&ctx)?.bind(&shape, args)
        };
        // The counts are there: two experts with every token. 900,000 tokens are 56,250 items of the
        // shared expert.
        for tokens in [900_000, 1_000_000] {
            let shape = shape(tokens);
            let at = shape.sections().unwrap();
            let mut words = vec![0; at.words as usize];
            words[at.expert_offsets as usize..][..2].fill(tokens);
            words[at.token_offsets as usize..][..tokens as usize].fill(2);
            let (plan, stats) = (Output::holding(&gpu, &words), Output::u32s(&gpu, 10));
            let bound = bind(tokens, &stats, &plan);
            if tokens == 1_000_000 {
                refuses(&gpu, bound, "tokens", 1_000_000);
                continue;
            }
            run(&gpu, &bound.expect("within the limit"));
            let got: Vec<u32> = plan.get(&gpu);
            let what = variant_name(&ctx);
            let starts: Vec<u32> = (0..4).map(|e| e * tokens).collect();
            assert_same(&got[at.expert_offsets as usize..][..4], &starts, &what);
            let items = tokens / 16;
            let tiles: Vec<u32> = (0..4).map(|e| e * items).collect();
            assert_same(&got[at.tile_offsets as usize..][..4], &tiles, &what);
            let want: Vec<u32> = (0..3 * items).flat_map(|i| [i / items, i * 16]).collect();
            assert_same(&got[at.tile_items as usize..][..want.len()], &want, &what);
            let of_tokens: Vec<u32> = (0..=tokens).map(|t| 3 * t).collect();
            assert_same(&got[at.token_offsets as usize..][..of_tokens.len()], &of_tokens, &what);
            assert_eq!(stats.get::<u32>(&gpu)[..2], [2 * tokens, 2], "{what}");
        }
    }
}

fn shape(tokens: u32) -> PlanShape {
    PlanShape::on_host(tokens, 2, 2 * tokens).with_item_rows(16, 4).with_shared_experts(1)
}

#[test]
fn coresets_of_very_long_blocks() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (600_000, 2);
    let r = random(1, tokens * experts);
    let offsets = [1, tokens as u32 - 1];
    let rule = BlockRule::Capacity(1);
    let want = coreset::cpu(rule, &r, experts, &[], &offsets, None);
    for ctx in layouts(&gpu) {
        let (r, offsets) = (gpu.upload(&r), gpu.upload(&offsets));
        let (members, block_of) = (Output::u32s(&gpu, 1), Output::u32s(&gpu, tokens));
        let args = coreset::Args {
            refresh: None,
            values: (&r).into(),
            own_choice: None,
            offsets: (&offsets).into(),
            voters: None,
            members: members.slice(),
            block_of: block_of.slice(),
        };
        let dims = coreset::Dims { tokens: tokens as u32, blocks: 1 };
        let op = coreset::Coreset::new(&ctx, experts as u32, rule).unwrap();
        run(&gpu, &op.bind(&dims, args).expect("within the limit"));
        assert_same(&members.get::<u32>(&gpu), &want.0, &variant_name(&ctx));
        assert_same(&block_of.get::<u32>(&gpu), &want.1, &variant_name(&ctx));
    }
}

/// The matmul of software drivers loops over the depth of a row.
#[test]
fn logits_of_deep_rows() {
    let Some(gpu) = gpu() else { return };
    let bind = |ctx: &Context, hidden: u32| {
        let [x, weights] = [(); 2].map(|()| gpu.upload(&vec![0f32; hidden as usize]));
        let out = Output::f32s(&gpu, 1);
        let op = logits::Logits::new(ctx, hidden, 1).unwrap();
        let args = logits::Args { x: (&x).into(), weights: (&weights).into(), logits: out.slice() };
        op.bind(&logits::Dims { tokens: 1 }, args)
    };
    for ctx in layouts(&gpu) {
        bind(&ctx, 100_000).expect("within the loops");
        if ctx.variant().target == Target::Serial {
            refuses(&gpu, bind(&ctx, 200_000), "hidden", 200_000);
        }
    }
}
