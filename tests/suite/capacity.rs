//! Capacities on the device, and expert choice with them.
//!
//! Long: every source of capacities shares one comparison.
use crate::schedule::{odd_ratios, schedules};
use testkit::golden::{self, File};
use testkit::prelude::{Output, assert_close, assert_same, contexts, gpu, random, run};
use wgmoe::ops::capacity::{Args, Capacity, Dims, HostSource, Source, cpu};
use wgmoe::ops::{expert_choice, plan_count, scores};
use wgmoe::plan::bits;
use wgmoe::routing::schedule::{Schedule, ScheduleKind, mask_ratio, slot_bound};
use wgmoe::{Context, Error, Gpu, PlanShape, Score, Slice, Variant, wgpu};

/// Runs the kernel: (capacities, k).
fn capacities(
    ctx: &Context,
    gpu: &Gpu,
    source: HostSource<'_>,
    tokens: u32,
    experts: u32,
    offsets: &[u32],
    lengths: Option<&[u32]>,
) -> (Vec<u32>, Vec<u32>) {
    let sequences = offsets.len() - 1;
    let upload_steps = |s: &Schedule| gpu.upload(&s.staircase().unwrap().words());
    let (values, steps) = match source {
        HostSource::Ratios(schedule, ratios) => (gpu.upload(ratios), Some(upload_steps(schedule))),
        HostSource::Masked(schedule, masked) => (gpu.upload(masked), Some(upload_steps(schedule))),
        HostSource::ExpertsPerToken(k) => (gpu.upload(k), None),
    };
    let values = Slice::from(&values);
    let steps = steps.as_ref().map(Slice::from);
    let source = match (source, steps) {
        (HostSource::Ratios(..), Some(steps)) => Source::Ratios { ratios: values, steps },
        (HostSource::Masked(..), Some(steps)) => Source::Masked { masked: values, steps },
        _ => Source::ExpertsPerToken(values),
    };
    let offsets = gpu.upload(offsets);
    let lengths = lengths.map(|l| gpu.upload(l));
    let [capacity, k] = [0; 2].map(|_| Output::u32s(gpu, sequences));
    let args = Args {
        source,
        offsets: (&offsets).into(),
        lengths: lengths.as_ref().map(Slice::from),
        capacity_of: capacity.slice(),
        k_of: k.slice(),
    };
    let dims = Dims { tokens, experts, sequences: sequences as u32 };
    run(gpu, &Capacity::new(ctx).unwrap().bind(&dims, args).unwrap());
    (capacity.get(gpu), k.get(gpu))
}

/// Offsets of sequences of these lengths.
fn offsets_of(lengths: &[u32]) -> Vec<u32> {
    let mut offsets = vec![0];
    for n in lengths {
        offsets.push(offsets[offsets.len() - 1] + n);
    }
    offsets
}

#[test]
fn recorded_schedules_are_exact() {
    let Some(gpu) = gpu() else { return };
    let file = File::open("capacity_schedules").unwrap();
    let (ratios, rows) = golden::schedules(&file).unwrap();
    let offsets: Vec<u32> = (0..=ratios.len() as u32).map(|b| b * 100).collect();
    for ctx in contexts(&gpu) {
        for (schedule, row) in &rows {
            let source = HostSource::Ratios(schedule, &ratios);
            let (capacity, k) = capacities(&ctx, &gpu, source, 9700, 17, &offsets, None);
            let what = format!("{schedule:?}, {:?}", ctx.variant());
            assert_same(&k, row, &what);
            let want: Vec<u32> = row.iter().map(|k| (100 * k / 17).clamp(1, 100)).collect();
            assert_same(&capacity, &want, &what);
        }
    }
}

#[test]
fn thresholds_and_odd_ratios_are_exact() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for schedule in schedules() {
            let mut ratios = odd_ratios();
            let steps = schedule.staircase().unwrap();
            // Every threshold of the plain schedules, one in seven of those with a thousand.
            let every = if steps.list().len() > 100 { 7 } else { 1 };
            for step in steps.list().iter().step_by(every) {
                let at = step.first.to_bits();
                ratios.extend((at.saturating_sub(2)..=at + 2).map(f32::from_bits));
            }
            let offsets: Vec<u32> = (0..=ratios.len() as u32).map(|b| 3 * b).collect();
            let tokens = 3 * ratios.len();
            let source = HostSource::Ratios(&schedule, &ratios);
            let got = capacities(&ctx, &gpu, source, tokens as u32, 40, &offsets, None);
            let want = cpu(source, tokens, 40, &offsets, None);
            let what = format!("{schedule:?}, {:?}", ctx.variant());
            assert_same(&got.1, &want.1, &what);
            assert_same(&got.0, &want.0, &what);
        }
    }
}

#[test]
fn masked_counts_are_exact() {
    let Some(gpu) = gpu() else { return };
    let [bell, cosine, linear] = [
        Schedule::new(ScheduleKind::Gaussian, 0, 1024),
        Schedule::new(ScheduleKind::CosineReverse, 8, 32),
        Schedule::new(ScheduleKind::Linear, 0, 1024),
    ];
    // All counts of some lengths, one masked token more than there are included, and none of an empty sequence.
    let mut cases: Vec<(u32, u32)> = vec![(0, 0), (1, 0), (u32::MAX, 3)];
    for n in [1, 2, 3, 7, 31, 64, 100, 257, 512, 513] {
        cases.extend((0..=n + 1).map(|m| (m, n)));
    }
    for (i, x) in random(4, 400).into_iter().enumerate() {
        let n = 1 + (1 << (i % 21)) + i as u32 * 37;
        cases.push(((x.abs() * n as f32) as u32, n));
    }
    let (masked, lengths): (Vec<u32>, Vec<u32>) = cases.into_iter().unzip();
    let offsets = offsets_of(&lengths);
    let tokens = offsets[lengths.len()];
    for ctx in contexts(&gpu) {
        for schedule in [bell, cosine, linear] {
            let source = HostSource::Masked(&schedule, &masked);
            let got = capacities(&ctx, &gpu, source, tokens, 384, &offsets, None);
            let want = cpu(source, tokens as usize, 384, &offsets, None);
            let what = format!("{schedule:?}, {:?}", ctx.variant());
            assert_same(&got.1, &want.1, &what);
            assert_same(&got.0, &want.0, &what);
            // Padding does not count.
            let unpadded: Vec<u32> = lengths.iter().map(|n| n / 2 + 1).collect();
            let got = capacities(&ctx, &gpu, source, tokens, 384, &offsets, Some(&unpadded));
            assert_eq!(
                got,
                cpu(source, tokens as usize, 384, &offsets, Some(&unpadded)),
                "{what}, padded"
            );
        }
        // Lengths that only 32 bits hold: quotients at both sides of each threshold.
        for n in [u32::MAX, (1 << 31) + 1, (1 << 24) + 1, (1 << 25) - 1] {
            for step in linear.staircase().unwrap().list().iter().step_by(97) {
                let at = (f64::from(step.first) * f64::from(n)) as u32;
                for m in at.saturating_sub(1)..=at.saturating_add(2) {
                    let source = HostSource::Masked(&linear, &[m]);
                    let got = capacities(&ctx, &gpu, source, n, 1024, &[0, n], None);
                    assert_eq!(got, cpu(source, n as usize, 1024, &[0, n], None), "{m} of {n}");
                }
            }
        }
    }
}

/// A staircase with one step for the very f32 that is wanted shows whether the device's quotient is that one, ties included.
#[test]
fn quotients_are_the_nearest_f32() {
    let Some(gpu) = gpu() else { return };
    let mut cases = vec![];
    for n in [1 << 25, 1 << 26, 1 << 31, 3 << 30, u32::MAX, (1 << 31) + 1, (1 << 24) - 1, 513] {
        for i in 1..16 {
            // Near a half (ties, where the length is a power of two), near 1 (which may round to 1), and anywhere.
            cases.extend([(n / 2 + i, n), (n - i, n), (n / 17 * i, n), (i, n)]);
        }
    }
    for ctx in contexts(&gpu) {
        let op = Capacity::new(&ctx).unwrap();
        for &(m, n) in &cases {
            let key = mask_ratio(m, n).to_bits() + 1;
            let steps = gpu.upload(&[[0, 0], [key, 1], [key + 1, 2]]);
            let [masked, offsets] = [gpu.upload(&[m]), gpu.upload(&[0, n])];
            let [capacity, k] = [0; 2].map(|_| Output::u32s(&gpu, 1));
            let args = Args {
                source: Source::Masked { masked: (&masked).into(), steps: (&steps).into() },
                offsets: (&offsets).into(),
                lengths: None,
                capacity_of: capacity.slice(),
                k_of: k.slice(),
            };
            let dims = Dims { tokens: n, experts: 1024, sequences: 1 };
            run(&gpu, &op.bind(&dims, args).unwrap());
            assert_eq!(k.get::<u32>(&gpu), [1], "{m} / {n}, {:?}", ctx.variant());
            assert_eq!(capacity.get::<u32>(&gpu), [(n / 1024).max(1)], "{m} / {n}");
        }
    }
}

#[test]
fn capacities_of_odd_sizes() {
    let Some(gpu) = gpu() else { return };
    let lengths = [1, 7, 512, 513, 0, 1 << 20, 2, 3, (1 << 20) - 1, 65_537];
    let offsets = offsets_of(&lengths);
    let tokens = offsets[lengths.len()];
    let padded = [0, 9, 511, u32::MAX, 5, 1 << 19, 1, 3, 1, 65_536];
    let wild = [7, 3, u32::MAX, 5, 600, 600, 0, 900, 1_000_000, 2, 1];
    for ctx in contexts(&gpu) {
        for experts in [1, 2, 17, 40, 384, 512, 1023, 1024] {
            for k in [0, 1, 5, 20, 39, 40, 512, 1023, 1024, u32::MAX] {
                let what = format!("{experts} experts, k {k}, {:?}", ctx.variant());
                let k = vec![k; lengths.len()];
                let source = HostSource::ExpertsPerToken(&k);
                for (offsets, lengths) in [
                    (&offsets[..], None),
                    (&offsets, Some(&padded[..])),
                    (&wild, None),
                    (&wild, Some(&padded)),
                ] {
                    let got = capacities(&ctx, &gpu, source, tokens, experts, offsets, lengths);
                    assert_eq!(
                        got,
                        cpu(source, tokens as usize, experts, offsets, lengths),
                        "{what}"
                    );
                }
                let got = capacities(&ctx, &gpu, source, tokens, experts, &offsets, None).0;
                assert_eq!(got[4], 0, "{what}: an empty sequence");
                for (n, c) in lengths.iter().zip(&got) {
                    assert!(*c <= *n && *c >= 1.min(*n), "{what}: {c} of {n}");
                }
            }
        }
    }
}

#[test]
fn slices_of_one_buffer() {
    let Some(gpu) = gpu() else { return };
    let schedule = Schedule::new(ScheduleKind::Cosine, 1, 9);
    let words = schedule.staircase().unwrap().words();
    let ratios = [0.1f32, f32::NAN, 0.8];
    let offsets = [0u32, 1, 8, 520];
    // Five sections, aligned.
    let mut all = vec![u32::MAX; 5 * 64];
    all[..3].copy_from_slice(bytemuck::cast_slice(&ratios));
    all[64..68].copy_from_slice(&offsets);
    all[128..128 + 2 * words.len()].copy_from_slice(bytemuck::cast_slice(&words));
    for ctx in contexts(&gpu) {
        let buffer = gpu.upload(&all);
        let section = |i: u64, n: u64| Slice::new(&buffer, 256 * i, 4 * n);
        let args = Args {
            source: Source::Ratios {
                ratios: section(0, 3),
                steps: section(2, 2 * words.len() as u64),
            },
            offsets: section(1, 4),
            lengths: None,
            capacity_of: section(3, 3),
            k_of: section(4, 3),
        };
        let dims = Dims { tokens: 520, experts: 12, sequences: 3 };
        run(&gpu, &Capacity::new(&ctx).unwrap().bind(&dims, args).unwrap());
        let got: Vec<u32> = gpu.download(&buffer).unwrap();
        let (capacity, k) = cpu(HostSource::Ratios(&schedule, &ratios), 520, 12, &offsets, None);
        let mut want = all.clone();
        want[192..195].copy_from_slice(&capacity);
        want[256..259].copy_from_slice(&k);
        assert_same(&got, &want, &format!("{:?}", ctx.variant()));
    }
}

#[test]
fn wrong_arguments_are_errors() {
    let Some(gpu) = gpu() else { return };
    let buffer = gpu.upload(&[0u32; 1024]);
    let outputs = gpu.upload(&[0u32; 1024]);
    let slice = |n: u64| Slice::new(&buffer, 0, 4 * n);
    let out = |i: u64, n: u64| Slice::new(&outputs, 256 * i, 4 * n);
    let good = Args {
        source: Source::Ratios { ratios: slice(3), steps: slice(6) },
        offsets: slice(4),
        lengths: Some(slice(3)),
        capacity_of: out(0, 3),
        k_of: out(1, 3),
    };
    let dims = Dims { tokens: 10, experts: 4, sequences: 3 };
    let op = Capacity::new(&Context::new(&gpu.device).unwrap()).unwrap();
    assert_eq!(op.bind(&dims, good).unwrap().dispatches().len(), 1);
    assert!(op.bind(&Dims { sequences: 0, ..dims }, good).unwrap().dispatches().is_empty());
    let invalid =
        |dims| matches!(op.bind(&dims, good), Err(Error::Invalid { name: "experts", .. }));
    assert!(invalid(Dims { experts: 0, ..dims }) && invalid(Dims { experts: 1025, ..dims }));
    let name = |args| match op.bind(&dims, args) {
        Err(Error::Size { name, .. } | Error::Overlap { written: name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        name(Args { source: Source::Ratios { ratios: slice(2), steps: slice(6) }, ..good }),
        "ratios"
    );
    assert_eq!(
        name(Args { source: Source::Masked { masked: slice(4), steps: slice(6) }, ..good }),
        "masked"
    );
    let k = Source::ExpertsPerToken(slice(2));
    assert_eq!(name(Args { source: k, ..good }), "experts_per_token");
    let far = Slice { size: u64::MAX, ..slice(6) };
    for steps in [slice(0), slice(1), slice(5), far] {
        assert_eq!(
            name(Args { source: Source::Ratios { ratios: slice(3), steps }, ..good }),
            "steps"
        );
    }
    assert_eq!(name(Args { offsets: slice(3), ..good }), "offsets");
    assert_eq!(name(Args { lengths: Some(slice(4)), ..good }), "lengths");
    assert_eq!(name(Args { capacity_of: out(0, 2), ..good }), "capacity_of");
    assert_eq!(name(Args { k_of: out(0, 4), ..good }), "k_of");
    assert_eq!(name(Args { k_of: out(0, 3), ..good }), "capacity_of");
}

/// Ratios to capacities to assignments in one recording, for sequences of very different lengths; then again with other
/// ratios, in the same submission, without making anything.
#[test]
fn ragged_expert_choice_follows_the_ratios() {
    // A device of its own: what other tests make would be counted too.
    let Some(Ok(gpu)) = gpu().map(|_| Gpu::new()) else { return };
    let (experts, spans, lengths) = (40u32, [1, 7, 512, 513, 20], [1, 7, 500, 513, 0]);
    let offsets = offsets_of(&spans);
    let tokens = offsets[5];
    let r = random(5, (tokens * experts) as usize);
    // k reaches beyond the experts.
    let schedule = Schedule::new(ScheduleKind::LinearReverse, 0, 64);
    let steps_of_denoising = [[1.0, f32::NAN, 0.9, 0.35, 0.5], [0.0, 1.5, 0.1, 0.9, 0.2]];
    for variant in Variant::all(&gpu.device) {
        let ctx = Context::with_variant(&gpu.device, variant).unwrap();
        let steps = gpu.upload(&schedule.staircase().unwrap().words());
        let [ratios, later] = steps_of_denoising.map(|ratios| gpu.upload(&ratios));
        let [offset_buffer, length_buffer] = [gpu.upload(&offsets), gpu.upload(&lengths)];
        let r_buffer = gpu.upload(&r);
        let words = bits::empty(tokens as usize, experts as usize).len();
        let [capacity, k] = [0; 2].map(|_| Output::u32s(&gpu, 5));
        let assigned = Output::u32s(&gpu, words);
        let [first_capacity, first_assigned] = [5, words].map(|n| Output::u32s(&gpu, n));

        let dims = Dims { tokens, experts, sequences: 5 };
        let args = Args {
            source: Source::Ratios { ratios: (&ratios).into(), steps: (&steps).into() },
            offsets: (&offset_buffer).into(),
            lengths: Some((&length_buffer).into()),
            capacity_of: capacity.slice(),
            k_of: k.slice(),
        };
        let choose = expert_choice::Args {
            values: (&r_buffer).into(),
            offsets: (&offset_buffer).into(),
            lengths: Some((&length_buffer).into()),
            capacity: capacity.slice(),
            assigned: assigned.slice(),
        };
        let choice = expert_choice::ExpertChoice::new(&ctx).unwrap();
        let step = Capacity::new(&ctx).unwrap().bind(&dims, args).unwrap().then(
            choice.bind(&expert_choice::Dims { tokens, experts, sequences: 5 }, choose).unwrap(),
        );

        let count = || {
            let hal = gpu.device.get_internal_counters().hal;
            [
                hal.buffers.read(),
                hal.bind_groups.read(),
                hal.compute_pipelines.read(),
                hal.shader_modules.read(),
            ]
        };
        let keep = |encoder: &mut wgpu::CommandEncoder, from: Slice<'_>, to: Slice<'_>| {
            encoder.copy_buffer_to_buffer(
                from.buffer,
                from.offset,
                to.buffer,
                to.offset,
                from.size,
            );
        };
        let (before, pipelines) = (count(), ctx.pipelines());
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        step.record(&mut encoder.begin_compute_pass(&Default::default()));
        keep(&mut encoder, capacity.slice(), first_capacity.slice());
        keep(&mut encoder, assigned.slice(), first_assigned.slice());
        keep(&mut encoder, (&later).into(), (&ratios).into());
        step.record(&mut encoder.begin_compute_pass(&Default::default()));
        assert_eq!((count(), ctx.pipelines()), (before, pipelines), "recording makes nothing");
        assert!(before[0] > 0, "the counters count");
        gpu.queue.submit([encoder.finish()]);
        gpu.wait().unwrap();

        let results: [(Vec<u32>, Vec<u32>); 2] = [
            (first_capacity.get(&gpu), first_assigned.get(&gpu)),
            (capacity.get(&gpu), assigned.get(&gpu)),
        ];
        assert_ne!(results[0], results[1]);
        for (values, (got, got_bits)) in steps_of_denoising.iter().zip(results) {
            let source = HostSource::Ratios(&schedule, values);
            let (want, _) = cpu(source, tokens as usize, experts, &offsets, Some(&lengths));
            assert_eq!(got, want, "{values:?}");
            let want_bits =
                expert_choice::cpu(&r, experts as usize, &offsets, Some(&lengths), &want);
            assert_same(&got_bits, &want_bits, &format!("{values:?}, {:?}", ctx.variant()));
            for e in 0..experts as usize {
                let chosen = bits::tokens_of(&got_bits, tokens as usize, e);
                assert_eq!(
                    chosen.len() as u32,
                    want.iter().sum::<u32>(),
                    "an expert's slots, as scheduled"
                );
                assert!(chosen.iter().all(|&t| !(508..520).contains(&t) && t < 1033), "padding");
            }
            let slots: u32 = got_bits.iter().map(|w| w.count_ones()).sum();
            assert!(slots <= slot_bound(lengths, experts, schedule.k_max).unwrap());
        }
    }
}

#[test]
fn recorded_capacities_per_sequence() {
    let Some(gpu) = gpu() else { return };
    for name in ["expert_choice_06", "expert_choice_07"] {
        let file = File::open(name).unwrap();
        let [sequences, each, experts] =
            ["sequences", "tokens", "experts"].map(|key| file.number(key).unwrap());
        let tokens = sequences * each;
        let softmax = file.score().unwrap() == Score::Softmax;
        let want_gates = file.f32s("gates").unwrap();
        let mut want_bits = bits::empty(tokens as usize, experts as usize);
        let selected = file.flags("selected").unwrap();
        for (i, &selected) in selected.iter().enumerate() {
            if selected {
                bits::set(
                    &mut want_bits,
                    tokens as usize,
                    i % experts as usize,
                    i / experts as usize,
                );
            }
        }
        let offsets: Vec<u32> = (0..=sequences).map(|b| b * each).collect();
        let pairs = (tokens * experts) as usize;
        let shape = PlanShape::on_host(
            tokens,
            experts,
            slot_bound(vec![each; sequences as usize], experts, 8).unwrap(),
        )
        .with_item_rows(16, 0);
        for ctx in contexts(&gpu) {
            let logits = gpu.upload(&file.f32s("logits").unwrap());
            let k = file.u32s("experts_per_token").unwrap();
            let [k, offsets] = [&k, &offsets].map(|w| gpu.upload(w));
            let [s, r, gates] = [0; 3].map(|_| Output::f32s(&gpu, pairs));
            let [capacity, k_out] = [0; 2].map(|_| Output::u32s(&gpu, sequences as usize));
            let assigned = Output::u32s(&gpu, want_bits.len());
            let plan = Output::u32s(&gpu, shape.bytes().unwrap() as usize / 4);
            let score = if softmax { Score::Softmax } else { Score::Sigmoid };
            let args = scores::Args {
                logits: (&logits).into(),
                bias: None,
                scores: s.slice(),
                values: r.slice(),
            };
            let step = scores::Scores::new(&ctx).unwrap();
            let step =
                step.bind(&scores::Dims { tokens, experts, score, by_logits: true }, args).unwrap();
            let args = Args {
                source: Source::ExpertsPerToken((&k).into()),
                offsets: (&offsets).into(),
                lengths: None,
                capacity_of: capacity.slice(),
                k_of: k_out.slice(),
            };
            let dims = Dims { tokens, experts, sequences };
            let step = step.then(Capacity::new(&ctx).unwrap().bind(&dims, args).unwrap());
            let args = expert_choice::Args {
                values: r.slice(),
                offsets: (&offsets).into(),
                lengths: None,
                capacity: capacity.slice(),
                assigned: assigned.slice(),
            };
            let choice = expert_choice::ExpertChoice::new(&ctx).unwrap();
            let dims = expert_choice::Dims { tokens, experts, sequences };
            let step = step.then(choice.bind(&dims, args).unwrap());
            let weights = plan_count::Gates {
                rule: if softmax {
                    wgmoe::routing::GateRule::Softmax
                } else {
                    wgmoe::routing::GateRule::Normalised
                },
                source: if softmax { (&logits).into() } else { s.slice() },
                scale: 1.0,
                scales: plan_count::Scales { scale_by_count: None, scale_by_expert: None },
                gates: gates.slice(),
            };
            let args = plan_count::Args {
                assigned: assigned.slice(),
                gates: Some(weights),
                plan: plan.slice(),
            };
            let step =
                step.then(plan_count::PlanCount::new(&ctx).unwrap().bind(&shape, args).unwrap());
            run(&gpu, &step);

            let what = format!("{name}, {:?}", ctx.variant());
            assert_same(&k_out.get::<u32>(&gpu), &file.u32s("experts_per_token").unwrap(), &what);
            assert_same(&assigned.get::<u32>(&gpu), &want_bits, &what);
            // Gates are written where assigned; elsewhere the poison is left.
            let mut got: Vec<f32> = gates.get(&gpu);
            for (i, g) in got.iter_mut().enumerate() {
                let chosen = selected[i];
                assert_eq!(chosen, !g.is_nan(), "{what}: gate {i}");
                if !chosen {
                    *g = 0.0;
                }
            }
            assert_close(&got, &want_gates, 1e-5, 1e-4, &what);
        }
    }
}
