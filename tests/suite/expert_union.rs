use testkit::{cases, prelude::*};
use wgmoe::ops::expert_union::{Args, Dims, ExpertUnion, cpu};
use wgmoe::{Context, Gpu};

fn check(
    gpu: &Gpu,
    ctx: &Context,
    assigned: &[u32],
    [tokens, experts]: [usize; 2],
    offsets: &[u32],
    size: u64,
) {
    let what = format!("{} T {tokens} E {experts} {} blocks", variant_name(ctx), offsets.len() - 1);
    let (want_members, want_counts, want_bytes) = cpu(assigned, tokens, experts, offsets, size);
    let blocks = offsets.len() - 1;
    let members = Output::u32s(gpu, want_members.len());
    let (counts, bytes) = (Output::u32s(gpu, blocks), Output::u32s(gpu, 2 * blocks));
    let (a, o) = (gpu.upload(assigned), gpu.upload(offsets));
    let args = Args {
        assigned: (&a).into(),
        offsets: (&o).into(),
        members: members.slice(),
        counts: counts.slice(),
        bytes: bytes.slice(),
        totals: None,
    };
    let dims = Dims {
        tokens: tokens as u32,
        experts: experts as u32,
        blocks: blocks as u32,
        expert_bytes: size,
    };
    run(gpu, &ExpertUnion::new(ctx).unwrap().bind(&dims, args).unwrap());
    assert_same(&members.get::<u32>(gpu), &want_members, &what);
    assert_same(&counts.get::<u32>(gpu), &want_counts, &what);
    let bytes: Vec<u64> = bytes
        .get::<u32>(gpu)
        .chunks_exact(2)
        .map(|w| u64::from(w[0]) | u64::from(w[1]) << 32)
        .collect();
    assert_same(&bytes, &want_bytes, &what);
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    // (tokens, offsets)
    let table: &[(usize, &[u32])] = &[
        (1, &[0, 1]),
        (64, &[0, 32, 64]),
        (70, &[0, 32, 64, 70]),
        (70, &[0, 5, 37, 38, 70]),
        (70, &[0, 70]),
        (70, &[3, 3, 9, 9]),         // empty blocks
        (70, &[20, 10, 40, 30, 60]), // not monotone
        (70, &[0, 50, u32::MAX, 71]),
        (33, &[40, 50]),
        (200, &[1, 31, 32, 33, 63, 65, 127, 129, 199]),
    ];
    for ctx in contexts(&gpu) {
        for (i, &(tokens, offsets)) in table.iter().enumerate() {
            for (experts, probability) in
                [(1, 0.3), (40, 0.02), (96, 0.2), (384, 0.0), (1024, 0.01), (40, 1.0)]
            {
                // Bits past the last token belong to no block.
                let mut assigned = cases::assignment(i as u64, tokens, experts, probability);
                if tokens % 32 != 0 {
                    let columns = tokens.div_ceil(32);
                    for e in 0..experts {
                        assigned[e * columns + columns - 1] |= u32::MAX << (tokens % 32);
                    }
                }
                check(&gpu, &ctx, &assigned, [tokens, experts], offsets, 0xf_edcb_a987);
            }
        }
    }
}

#[test]
fn bytes_have_64_bits() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for size in
            [0, 1, 6_291_456, u64::from(u32::MAX), 0x1_0000_0000, 0xffff_ffff_ffff, u64::MAX / 1024]
        {
            let assigned = cases::assignment(3, 32, 1024, 1.0);
            check(&gpu, &ctx, &assigned, [32, 1024], &[0, 32], size);
        }
    }
}

#[test]
fn long_batches() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        // One block of everything, empty until its end; and as many blocks of one token as there are tokens.
        let mut assigned = vec![0; 1024 * 2048];
        assigned.iter_mut().skip(2047).step_by(2048 * 3).for_each(|w| *w = 1 << 31);
        check(&gpu, &ctx, &assigned, [65_536, 1024], &[0, 65_536], 5);
        let assigned = cases::assignment(3, 3000, 9, 0.2);
        check(&gpu, &ctx, &assigned, [3000, 9], &(0..=3000).collect::<Vec<u32>>(), 5);
    }
}
