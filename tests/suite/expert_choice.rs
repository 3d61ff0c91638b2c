use testkit::{cases, prelude::*};
use wgmoe::ops::expert_choice::{
    Args, Dims, DropArgs, DropDims, ExpertChoice, cpu, cpu_drop, ranges,
};
use wgmoe::plan::bits;
use wgmoe::{Context, Gpu, Target};

/// What is chosen from.
#[derive(Clone)]
struct Choice<'a> {
    r: &'a [f32],
    experts: usize,
    offsets: &'a [u32],
    lengths: Option<&'a [u32]>,
    capacity: &'a [u32],
}

impl Choice<'_> {
    fn tokens(&self) -> usize {
        self.r.len() / self.experts
    }

    /// The device's bit set, written over stale bits.
    fn run(&self, gpu: &Gpu, ctx: &Context, seed: u64) -> Vec<u32> {
        let words = self.experts * bits::columns(self.tokens());
        let assigned = Output::holding(gpu, &cases::stale(seed, words));
        let (r, offsets, capacity) =
            (gpu.upload(self.r), gpu.upload(self.offsets), gpu.upload(self.capacity));
        let lengths = self.lengths.map(|l| gpu.upload(l));
        let args = Args {
            values: (&r).into(),
            offsets: (&offsets).into(),
            lengths: lengths.as_ref().map(Into::into),
            capacity: (&capacity).into(),
            assigned: assigned.slice(),
        };
        let dims = Dims {
            tokens: self.tokens() as u32,
            experts: self.experts as u32,
            sequences: self.capacity.len() as u32,
        };
        run(gpu, &ExpertChoice::new(ctx).unwrap().bind(&dims, args).unwrap());
        assigned.get(gpu)
    }

    fn twin(&self) -> Vec<u32> {
        cpu(self.r, self.experts, self.offsets, self.lengths, self.capacity)
    }
}

/// Highest value first, lower token first among equals, NaN last: as the bits of one integer, smallest first.
fn rank(value: f32, token: usize) -> u64 {
    let place = if value.is_nan() {
        u32::MAX
    } else {
        let bits = (value + 0.0).to_bits(); // -0 + 0 = 0
        if bits >> 31 == 0 { 0x7fff_ffff - bits } else { bits }
    };
    u64::from(place) << 32 | token as u64
}

/// The twin's result for one sequence, by selection in place of sorting, on as many threads as there are cores.
fn reference(r: &[f32], experts: usize, capacity: usize) -> Vec<u32> {
    let tokens = r.len() / experts;
    let columns = bits::columns(tokens);
    let mut assigned = bits::empty(tokens, experts);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = experts.div_ceil(threads);
    std::thread::scope(|scope| {
        for (i, part) in assigned.chunks_mut(share * columns).enumerate() {
            scope.spawn(move || {
                for (j, row) in part.chunks_mut(columns).enumerate() {
                    let e = i * share + j;
                    let mut ranks: Vec<u64> =
                        (0..tokens).map(|t| rank(r[t * experts + e], t)).collect();
                    if capacity < tokens {
                        ranks.select_nth_unstable(capacity);
                    }
                    for rank in &ranks[..capacity] {
                        let t = *rank as u32; // the low word
                        row[t as usize / 32] |= 1 << (t % 32);
                    }
                }
            });
        }
    });
    assigned
}

#[test]
fn reference_equals_twin() {
    for (seed, kind) in cases::KINDS.iter().enumerate() {
        let r = cases::values(kind, seed as u64, 45 * 7);
        for capacity in [1, 9, 45] {
            let twin = cpu(&r, 7, &[0, 45], None, &[capacity]);
            assert_same(&reference(&r, 7, capacity as usize), &twin, kind);
        }
    }
}

#[test]
fn sizes_and_kinds() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, experts, capacity) in [
            (1, 1, 1),
            (2, 9, 1),
            (31, 3, 5),
            (32, 8, 32),
            (33, 40, 33),
            (33, 40, 1),
            (64, 18, 9),
            (65, 96, 64),
            (97, 5, 12),
            (121, 16, 40),
            (257, 17, 100),
            (1024, 3, 300),
            (1025, 3, 300),
            (2047, 2, 7),
        ] {
            for (seed, kind) in cases::KINDS.iter().enumerate() {
                let r = cases::values(kind, seed as u64, tokens * experts);
                let choice = Choice {
                    r: &r,
                    experts,
                    offsets: &[0, tokens as u32],
                    lengths: None,
                    capacity: &[capacity],
                };
                let what =
                    format!("{} {kind} T {tokens} E {experts} C {capacity}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx, seed as u64), &choice.twin(), &what);
            }
        }
    }
}

#[test]
fn model_sizes() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, capacity) in
        [(512, 512, 32), (4096, 64, 512), (1000, 384, 21), (8192, 9, 8192)]
    {
        for kind in ["random", "ties", "equal", "mixed"] {
            let r = cases::values(kind, 1, tokens * experts);
            let choice = Choice {
                r: &r,
                experts,
                offsets: &[0, tokens as u32],
                lengths: None,
                capacity: &[capacity],
            };
            let twin = choice.twin();
            for ctx in contexts(&gpu) {
                let what =
                    format!("{} {kind} T {tokens} E {experts} C {capacity}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx, 3), &twin, &what);
            }
        }
    }
}

/// Cheap values in [-1, 1), one in 16 of them from a coarse grid, so that there are ties.
fn hashed(len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|i| {
            let mut h = i.wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995;
            h = (h ^ (h >> 15)).wrapping_mul(0x85eb_ca6b);
            h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
            h ^= h >> 16;
            let h = if h & 15 == 0 { h & 0xff00_0000 } else { h };
            (h >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

#[test]
fn long_batches() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, capacity) in [
        (65_536, 16, 4096),
        (65_536, 512, 128),
        (99_999, 7, 50_000),
        (200_003, 8, 100_000),
        (600_000, 8, 50_000),
    ] {
        let r = hashed(tokens * experts);
        let twin = reference(&r, experts, capacity);
        let choice = Choice {
            r: &r,
            experts,
            offsets: &[0, tokens as u32],
            lengths: None,
            capacity: &[capacity as u32],
        };
        // The kernel has no subgroup operations, and one layout for so many tokens.
        let all = contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups);
        for ctx in all.take(if experts == 512 { 1 } else { 2 }) {
            let start = std::time::Instant::now();
            let got = choice.run(&gpu, &ctx, 3);
            println!(
                "{} T {tokens} E {experts}: {:.2} s",
                variant_name(&ctx),
                start.elapsed().as_secs_f64()
            );
            assert_same(
                &got,
                &twin,
                &format!("{} T {tokens} E {experts} C {capacity}", variant_name(&ctx)),
            );
        }
    }
}

#[test]
fn long_batches_of_hard_values() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts) in [(65_536, 18), (262_144, 3)] {
        hard_values(&gpu, tokens, experts, 4096);
    }
}

fn hard_values(gpu: &Gpu, tokens: usize, experts: usize, capacity: usize) {
    let bits = |i: u32| i.wrapping_mul(0x9e37_79b9) ^ (i >> 3).wrapping_mul(0x85eb_ca6b);
    let outlier = |i: u32| if bits(i) < 1 << 20 { f32::MAX } else { 0.0 };
    // What no sample tells: any bits at all; equal but for outliers; sorted, with one value a stretch; the highest ones last.
    let kinds: [(&str, &dyn Fn(u32) -> f32); 4] = [
        ("bits", &|i| f32::from_bits(bits(i))),
        ("outliers", &|i| f32::from_bits(0x3f80_0000 + bits(i) % 2) + outlier(i)),
        ("sorted", &|i| (i / (64 * experts as u32)) as f32),
        ("last", &|i| {
            f32::from_bits(if i < tokens as u32 * 14 { i % 1000 } else { 0x7f00_0000 + i })
        }),
    ];
    for (kind, value) in kinds {
        let r: Vec<f32> = (0..(tokens * experts) as u32).map(value).collect();
        let twin = reference(&r, experts, capacity);
        let choice = Choice {
            r: &r,
            experts,
            offsets: &[0, tokens as u32],
            lengths: None,
            capacity: &[capacity as u32],
        };
        for ctx in contexts(gpu).into_iter().filter(|c| !c.variant().subgroups) {
            assert_same(
                &choice.run(gpu, &ctx, 3),
                &twin,
                &format!("{} {kind}", variant_name(&ctx)),
            );
        }
    }
}

#[test]
fn sequences() {
    let Some(gpu) = gpu() else { return };
    // (tokens, offsets, lengths, capacity)
    type Case<'a> = (usize, &'a [u32], Option<&'a [u32]>, &'a [u32]);
    let table: &[Case<'_>] = &[
        (96, &[0, 32, 64, 96], None, &[4, 32, 1]),
        (70, &[0, 33, 70], None, &[5, 6]),
        (70, &[0, 3, 7, 20, 21, 70], None, &[1, 2, 3, 4, 5]),
        // Empty sequences, inside a word too.
        (70, &[0, 33, 33, 70], None, &[5, 5, 6]),
        (70, &[0, 0, 10, 10, 10, 41, 70, 70], None, &[1, 2, 3, 4, 5, 6, 7]),
        (64, &[0, 0], None, &[3]),
        // Tokens before the first and behind the last sequence belong to none.
        (100, &[5, 40, 77], None, &[9, 8]),
        (100, &[40, 41], None, &[1]),
        // Padding.
        (96, &[0, 32, 64, 96], Some(&[32, 7, 1]), &[8, 8, 8]),
        (90, &[0, 30, 60, 90], Some(&[0, 40, u32::MAX]), &[8, 8, 8]),
        (90, &[0, 31, 59, 90], Some(&[1, 2, 3]), &[u32::MAX, 0, 3]),
        // Capacity of 0 is 1, above the length it is the length.
        (70, &[0, 33, 70], None, &[0, u32::MAX]),
        (70, &[0, 33, 70], None, &[38, 37]),
        // Offsets that decrease or exceed the tokens.
        (70, &[0, 50, 20, 60, 70], None, &[3, 3, 3, 3]),
        (70, &[60, 10, 20, 5], None, &[3, 3, 3]),
        (70, &[0, 35, u32::MAX], None, &[3, 3]),
        (70, &[u32::MAX, 0, 70], None, &[3, 3]),
        (33, &[71, 80, 90], None, &[3, 3]),
    ];
    for ctx in contexts(&gpu) {
        for (i, &(tokens, offsets, lengths, capacity)) in table.iter().enumerate() {
            for (experts, kind) in [(1, "random"), (11, "ties"), (40, "mixed")] {
                let r = cases::values(kind, i as u64, tokens * experts);
                let choice = Choice { r: &r, experts, offsets, lengths, capacity };
                let what = format!("{} case {i}, {kind}, E {experts}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx, 5), &choice.twin(), &what);
            }
        }
    }
}

#[test]
fn long_sequences() {
    let Some(gpu) = gpu() else { return };
    // Of more and of fewer tokens than a kernel keeps in registers, at any place in a word, sharing words.
    type Case<'a> = (&'a [u32], Option<&'a [u32]>, &'a [u32]);
    let table: &[Case<'_>] = &[
        (&[7, 1031, 1032, 3100, 5003], None, &[100, 1, 300, 1903]),
        (&[7, 1031, 1032, 3100, 5003], Some(&[1020, 1, 1500, 1100]), &[0, 1, u32::MAX, 64]),
        (&[0, 1024, 2048, 3073, 5003], None, &[1024, 1, 65, 0]),
        (&[31, 1055, 2111, 5003], Some(&[u32::MAX, 0, 1025]), &[512, 8, 1000]),
    ];
    for ctx in contexts(&gpu) {
        for (i, &(offsets, lengths, capacity)) in table.iter().enumerate() {
            for kind in ["random", "ties", "mixed", "equal"] {
                let r = cases::values(kind, i as u64, 5003 * 11);
                let choice = Choice { r: &r, experts: 11, offsets, lengths, capacity };
                let what = format!("{} case {i}, {kind}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx, 5), &choice.twin(), &what);
            }
        }
    }
}

#[test]
fn many_sequences() {
    let Some(gpu) = gpu() else { return };
    // 1,500 sequences of 0 to 6 tokens, many in a word; each with a capacity and a length of its own.
    let mut offsets = vec![0u32];
    for i in 0..1500u32 {
        offsets.push(offsets[i as usize] + i * 7 % 11 % 7);
    }
    let tokens = offsets[1500] as usize;
    let capacity: Vec<u32> = (0..1500).map(|i| i % 5).collect();
    let lengths: Vec<u32> = (0..1500).map(|i| i % 8).collect();
    let r = cases::values("ties", 2, tokens * 10);
    let choice = Choice {
        r: &r,
        experts: 10,
        offsets: &offsets,
        lengths: Some(&lengths),
        capacity: &capacity,
    };
    for ctx in contexts(&gpu) {
        assert_same(&choice.run(&gpu, &ctx, 9), &choice.twin(), &variant_name(&ctx));
    }
}

#[test]
fn padding_is_never_chosen() {
    let Some(gpu) = gpu() else { return };
    // The padding has the highest values.
    let (tokens, experts) = (60, 5);
    let r: Vec<f32> = (0..tokens * experts).map(|i| (i / experts) as f32).collect();
    let choice = Choice {
        r: &r,
        experts,
        offsets: &[0, 20, 60],
        lengths: Some(&[11, 3]),
        capacity: &[20, 20],
    };
    for ctx in contexts(&gpu) {
        let assigned = choice.run(&gpu, &ctx, 1);
        for e in 0..experts {
            let want: Vec<usize> = (0..11).chain(20..23).collect();
            assert_eq!(bits::tokens_of(&assigned, tokens, e), want, "{}", variant_name(&ctx));
        }
    }
}

#[test]
fn permuting_tokens_permutes_the_choice() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts, capacity) = (133, 24, 17);
    // All different, so that no tie hangs on the order.
    let values = cases::permutation(4, tokens * experts);
    let r: Vec<f32> = values.iter().map(|&v| v as f32 * 0.25 - 300.0).collect();
    let order = cases::permutation(5, tokens);
    let permuted: Vec<f32> =
        order.iter().flat_map(|&t| r[t * experts..][..experts].to_vec()).collect();
    let offsets = [0, tokens as u32];
    for ctx in contexts(&gpu) {
        let of = |r: &[f32]| {
            Choice { r, experts, offsets: &offsets, lengths: None, capacity: &[capacity] }
                .run(&gpu, &ctx, 6)
        };
        let (plain, permuted) = (of(&r), of(&permuted));
        for (now, &before) in order.iter().enumerate() {
            assert_eq!(
                bits::experts_of(&permuted, tokens, now),
                bits::experts_of(&plain, tokens, before),
                "{}",
                variant_name(&ctx)
            );
        }
    }
}

#[test]
fn drops_the_lowest_gates() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let op = ExpertChoice::new(&ctx).unwrap();
        for (tokens, experts, probability) in [
            (1, 1, 1.0),
            (33, 5, 0.5),
            (100, 40, 0.1),
            (300, 9, 1.0),
            (64, 3, 0.0),
            (2051, 11, 0.3),
            (1500, 9, 0.01),
            (1100, 3, 1.0),
            (1100, 3, 0.0),
        ] {
            for (seed, kind) in cases::KINDS.iter().enumerate() {
                for capacity in [0, 1, 7, 40, u32::MAX] {
                    let gates = cases::values(kind, seed as u64, tokens * experts);
                    let before = cases::assignment(seed as u64, tokens, experts, probability);
                    let (kept, lost) = cpu_drop(&gates, experts, &before, capacity);
                    let assigned = Output::holding(&gpu, &before);
                    let dropped = Output::u32s(&gpu, experts);
                    let buffers = (
                        gpu.upload(&gates),
                        gpu.upload(&[0, tokens as u32]),
                        gpu.upload(&[capacity]),
                    );
                    let args = DropArgs {
                        gates: (&buffers.0).into(),
                        offsets: (&buffers.1).into(),
                        capacity: (&buffers.2).into(),
                        assigned: assigned.slice(),
                        dropped: dropped.slice(),
                    };
                    run(
                        &gpu,
                        &op.bind_drop(
                            &DropDims { tokens: tokens as u32, experts: experts as u32 },
                            args,
                        )
                        .unwrap(),
                    );
                    let what = format!(
                        "{} {kind} T {tokens} E {experts} C {capacity}",
                        variant_name(&ctx)
                    );
                    assert_same(&assigned.get::<u32>(&gpu), &kept, &what);
                    assert_same(&dropped.get::<u32>(&gpu), &lost, &what);
                }
            }
        }
    }
}

#[test]
fn drops_in_a_long_batch() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts, capacity) = (65_536, 8, 9_000);
    let gates = hashed(tokens * experts);
    let before = cases::assignment(1, tokens, experts, 0.25);
    let (kept, lost) = cpu_drop(&gates, experts, &before, capacity);
    assert!(lost.iter().all(|&n| n > 0));
    for ctx in contexts(&gpu)
        .into_iter()
        .filter(|c| c.variant().target == Target::Serial || !c.variant().subgroups)
    {
        let (assigned, dropped) = (Output::holding(&gpu, &before), Output::u32s(&gpu, experts));
        let buffers =
            (gpu.upload(&gates), gpu.upload(&[0, tokens as u32]), gpu.upload(&[capacity]));
        let args = DropArgs {
            gates: (&buffers.0).into(),
            offsets: (&buffers.1).into(),
            capacity: (&buffers.2).into(),
            assigned: assigned.slice(),
            dropped: dropped.slice(),
        };
        let op = ExpertChoice::new(&ctx).unwrap();
        run(
            &gpu,
            &op.bind_drop(&DropDims { tokens: tokens as u32, experts: experts as u32 }, args)
                .unwrap(),
        );
        assert_same(&assigned.get::<u32>(&gpu), &kept, &variant_name(&ctx));
        assert_same(&dropped.get::<u32>(&gpu), &lost, &variant_name(&ctx));
    }
}

#[test]
fn ranges_are_clean() {
    assert_eq!(ranges(&[0, 50, 20, 60, 99], 70), [0..50, 50..50, 50..60, 60..70]);
    assert_eq!(ranges(&[u32::MAX, 0], 70), vec![70..70]);
}
