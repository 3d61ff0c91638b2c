//! Capacity schedules, the scaling table and reports on the host. Runs without a GPU.
use testkit::prelude::{assert_close, random};
use wgmoe::Error;
use wgmoe::plan::Stats;
use wgmoe::report::{Load, Report, slowest_device};
use wgmoe::routing::scaling::ScalingTable;
use wgmoe::routing::schedule::*;

/// Every shape with plain and extreme values.
pub(crate) fn schedules() -> Vec<Schedule> {
    let mut all = vec![Schedule::fixed(20), Schedule::fixed(0), Schedule::fixed(1024)];
    for kind in ScheduleKind::ALL.into_iter().skip(1) {
        for (k_min, k_max) in [(8, 32), (4, 4), (1, 2), (0, 1024), (3, 10)] {
            let gaussian = matches!(kind, ScheduleKind::Gaussian | ScheduleKind::GaussianReverse);
            let sigmas: &[f64] = if gaussian { &[0.22, 0.2, 1e-3, 10.0] } else { &[0.22] };
            all.extend(
                sigmas.iter().map(|&sigma| Schedule::new(kind, k_min, k_max).with_sigma(sigma)),
            );
        }
    }
    all
}

/// Ratios of every sort.
pub(crate) fn odd_ratios() -> Vec<f32> {
    let mut all =
        vec![0.0, f32::MIN_POSITIVE, 1e-45, 0.25, 0.5, 0.75, 1.0, 1.5, f32::MAX, f32::INFINITY];
    all.push(f32::from_bits(0.5f32.to_bits() - 1));
    all.push(f32::from_bits(0.5f32.to_bits() + 1));
    all.push(f32::from_bits(1.0f32.to_bits() - 1));
    all.push(f32::from_bits(1.0f32.to_bits() + 1));
    all.extend(all.clone().iter().map(|r| -r));
    all.extend(
        [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, 0x7fff_ffff, u32::MAX]
            .map(f32::from_bits),
    );
    all
}

/// What `words` say of a ratio: the last step whose key is not above the ratio's.
pub(crate) fn k_of_words(words: &[[u32; 2]], ratio: f32) -> u32 {
    let key = if ratio.is_nan() { 0 } else { ratio.clamp(0.0, 1.0).abs().to_bits() + 1 };
    words.iter().rev().find(|w| w[0] <= key).expect("the first key is 0")[1]
}

#[test]
fn steps_are_the_schedule_at_every_threshold() {
    for schedule in schedules() {
        let steps = schedule.staircase().unwrap();
        let words = steps.words();
        assert!(words.windows(2).all(|w| w[0][0] < w[1][0]), "{schedule:?}: keys ascend");
        assert!(
            steps.list().windows(2).all(|s| s[0].k != s[1].k),
            "{schedule:?}: a step is a change"
        );
        assert!(words.len() <= 2 + 2 * 1024, "{schedule:?}");
        let mut ratios = odd_ratios();
        ratios.extend((0..=4096).map(|i| i as f32 / 4096.0));
        ratios.extend(random(1, 1000));
        for step in steps.list() {
            let bits = step.first.to_bits();
            ratios.extend((bits.saturating_sub(40)..=bits + 40).map(f32::from_bits));
        }
        for ratio in ratios {
            assert_eq!(k_of_words(&words, ratio), schedule.k(ratio), "{schedule:?} at {ratio:e}");
        }
    }
}

#[test]
fn shapes_at_ends_and_middle() {
    let at = |kind| [0.0, 0.5, 1.0].map(|r| Schedule::new(kind, 8, 32).k(r));
    assert_eq!([0.0, 0.5, 1.0].map(|r| Schedule::fixed(20).k(r)), [20, 20, 20]);
    assert_eq!(at(ScheduleKind::Linear), [8, 20, 32]);
    assert_eq!(at(ScheduleKind::LinearReverse), [32, 20, 8]);
    assert_eq!(at(ScheduleKind::Cosine), [8, 20, 32]);
    assert_eq!(at(ScheduleKind::CosineReverse), [32, 20, 8]);
    assert_eq!(at(ScheduleKind::Bell), [8, 32, 8]);
    assert_eq!(at(ScheduleKind::Gaussian), [8, 32, 8]);
    assert_eq!(at(ScheduleKind::GaussianReverse), [32, 8, 32]);
    // Halves go to the even neighbour: 1.5 and 2.5 to 2.
    assert_eq!([0.25, 0.75].map(|r| Schedule::new(ScheduleKind::Linear, 1, 3).k(r)), [2, 2]);
    // Out of range, and NaN, which is the least k of reversed schedules too.
    for kind in ScheduleKind::ALL.into_iter().skip(1) {
        let s = Schedule::new(kind, 8, 32);
        assert_eq!([s.k(-3.0), s.k(f32::NEG_INFINITY)], [s.k(0.0); 2]);
        assert_eq!([s.k(7.0), s.k(f32::INFINITY)], [s.k(1.0); 2]);
        assert_eq!(s.k(f32::NAN), 8);
    }
}

#[test]
fn senseless_schedules_are_errors() {
    let name = |s: Schedule| match s.staircase() {
        Err(Error::Invalid { name, .. }) => name,
        other => panic!("{s:?}: {other:?}"),
    };
    let new = Schedule::new;
    assert_eq!(name(new(ScheduleKind::Linear, 9, 8)), "k_min");
    assert_eq!(name(new(ScheduleKind::Static, 8, 9)), "k_min");
    assert_eq!(name(new(ScheduleKind::Cosine, 8, 1025)), "k_max");
    for sigma in [0.0, -0.2, f64::NAN, f64::INFINITY, 1e-9, 100.0] {
        assert_eq!(name(new(ScheduleKind::Gaussian, 1, 8).with_sigma(sigma)), "sigma");
        assert_eq!(name(new(ScheduleKind::GaussianReverse, 1, 8).with_sigma(sigma)), "sigma");
        assert!(new(ScheduleKind::Bell, 1, 8).with_sigma(sigma).staircase().is_ok());
        // Total all the same.
        let k = new(ScheduleKind::Gaussian, 1, 8).with_sigma(sigma).k(0.5);
        assert!((1..=8).contains(&k));
    }
    assert_eq!("bell_gaussian".parse::<ScheduleKind>().unwrap(), ScheduleKind::Gaussian);
    assert!(
        "bell_curve".parse::<ScheduleKind>().unwrap_err().to_string().contains("linear_reverse")
    );
    for kind in ScheduleKind::ALL {
        assert_eq!(kind.name().parse::<ScheduleKind>().unwrap(), kind);
    }
}

#[test]
fn ratios_of_counts_are_the_nearest() {
    // Both operands are exact in f32 below 2^24, so its division is the definition.
    for length in (1..600).chain([4095, 65_537, (1 << 20) - 1, 1 << 20, (1 << 24) - 1]) {
        for i in 0..=600 {
            let masked =
                if length < 600 { i } else { (u64::from(length) * u64::from(i) / 600) as u32 };
            let want = (masked as f32 / length as f32).min(1.0);
            assert_eq!(mask_ratio(masked, length).to_bits(), want.to_bits(), "{masked} / {length}");
        }
    }
    // Above, no other f32 is nearer: |m / n - r| in exact integers, r = s 2^-e.
    for (i, x) in random(2, 4000).into_iter().enumerate() {
        let length = u32::MAX - (i as u32) * 997;
        let masked = (f64::from(x.abs()) * f64::from(length)) as u32 + 1;
        let distance = |bits: u32| {
            let e = 150 - (bits >> 23);
            let s = u128::from(bits & 0x7f_ffff | 0x80_0000);
            (u128::from(masked) << e).abs_diff(s * u128::from(length)) << (60 - e)
        };
        let bits = mask_ratio(masked, length).to_bits();
        let [below, at, above] = [bits - 1, bits, bits + 1].map(distance);
        assert!(at <= below && at <= above, "{masked} / {length}");
        assert!(
            (at < below && at < above) || bits.is_multiple_of(2),
            "{masked} / {length}: a tie goes to even"
        );
    }
    assert!(mask_ratio(3, 0).is_nan());
    assert_eq!([mask_ratio(9, 8), mask_ratio(u32::MAX, 1), mask_ratio(0, 5)], [1.0, 1.0, 0.0]);
}

#[test]
fn costs_of_schedules() {
    let shape = CostShape { length: 512, experts: 512, hidden: 512, intermediate: 384 };
    let cost = |s: Schedule, over: Ratios<'_>| s.expected(over, &shape).unwrap();
    let close =
        |got: f64, want: f64| assert!((got - want).abs() <= 1e-6 * want, "{got}, want {want}");
    let reverse = Schedule::new(ScheduleKind::LinearReverse, 8, 32);
    let [a, b] = [reverse, Schedule::fixed(20)].map(|s| cost(s, Ratios::Uniform));
    close(a.k, 20.0);
    close(a.slots, 20.0 * 512.0);
    close(a.flops, 20.0 * 512.0 * 6.0 * 512.0 * 384.0);
    close(a.flops, b.flops);
    // Against a fine sum over ratios.
    for s in schedules() {
        let samples: Vec<f32> = (0..200_000).map(|i| (i as f32 + 0.5) / 200_000.0).collect();
        let [exact, sum] = [Ratios::Uniform, Ratios::Samples(&samples)].map(|over| cost(s, over));
        assert!((exact.k - sum.k).abs() <= 0.01 * exact.k.max(1.0), "{s:?}: {exact:?}, {sum:?}");
    }
    let weighted = cost(reverse, Ratios::Weighted(&[(0.0, 3.0), (1.0, 1.0), (f32::NAN, 0.0)]));
    close(weighted.k, 26.0);
    close(cost(reverse, Ratios::Samples(&[0.0, 0.0, 0.0, 1.0])).slots, weighted.slots);
    // Short sequences: capacities round down, and are at least 1.
    let short = CostShape { length: 7, experts: 64, ..shape };
    close(Schedule::fixed(4).expected(Ratios::Uniform, &short).unwrap().slots, 64.0);
    close(Schedule::fixed(1024).expected(Ratios::Uniform, &short).unwrap().slots, 7.0 * 64.0);

    assert_eq!(reverse.matched(Ratios::Uniform, &shape).unwrap(), Schedule::fixed(20));
    assert_eq!(reverse.matched(Ratios::Samples(&[1.0]), &shape).unwrap(), Schedule::fixed(8));
    let bell = Schedule::new(ScheduleKind::Bell, 8, 32).matched(Ratios::Uniform, &shape).unwrap();
    assert_eq!(bell, Schedule::fixed(24));

    for over in [
        Ratios::Samples(&[]),
        Ratios::Weighted(&[(0.5, 0.0)]),
        Ratios::Weighted(&[(0.5, -1.0), (0.1, 2.0)]),
    ] {
        assert!(reverse.expected(over, &shape).is_err(), "{over:?}");
    }
    assert!(reverse.expected(Ratios::Weighted(&[(0.5, f64::NAN)]), &shape).is_err());
    assert!(reverse.expected(Ratios::Uniform, &CostShape { experts: 0, ..shape }).is_err());
}

#[test]
fn slot_bounds_hold() {
    assert_eq!(slot_bound([1, 7, 512, 513, 0], 40, 8).unwrap(), 40 * (1 + 1 + 102 + 102));
    assert_eq!(slot_bound([5, 6], 4, 1024).unwrap(), 44);
    assert!(slot_bound([1], 0, 1).is_err());
    assert!(slot_bound([u32::MAX, 1], 1024, 8).is_err());
    assert!(slot_bound_of_any(u32::MAX, 1, 1024, 2).is_err());
    assert!(slot_bound_of_any(1, 1, 0, 2).is_err());
    // One sequence is as long as all; of 16, 15 have a token each and one has the other 497.
    assert_eq!(slot_bound_of_any(512, 1, 512, 20).unwrap(), 512 * 20);
    assert_eq!(slot_bound_of_any(512, 16, 512, 32).unwrap(), 512 * (15 + 31));
    assert_eq!(slot_bound_of_any(0, 4, 8, 2).unwrap(), 0);
    assert_eq!(slot_bound_of_any(4, 0, 8, 2).unwrap(), 0);
    assert_eq!(slot_bound_of_any(3, u32::MAX, 8, 2).unwrap(), 3 * 8);
    for (i, x) in random(3, 2000).chunks_exact(8).enumerate() {
        let lengths: Vec<u32> = x.iter().map(|x| (x.abs().powi(4) * 700.0) as u32).collect();
        let (experts, k_max) = ([3, 17, 40, 512][i % 4], [0, 1, 2, 20, 64, 1024][i % 6]);
        let bound = slot_bound_of_any(lengths.iter().sum(), 8, experts, k_max).unwrap();
        let own = slot_bound(lengths.iter().copied(), experts, k_max).unwrap();
        // No bound could be less: some sequences make as many.
        let tokens: u32 = lengths.iter().sum();
        let short = 7.min(tokens.saturating_sub(1));
        let worst = (0..short).map(|_| 1).chain([tokens - short]);
        assert_eq!(slot_bound(worst, experts, k_max).unwrap(), bound);
        assert!(own <= bound, "{lengths:?}, {experts} experts, k {k_max}: {own} > {bound}");
        for k in 0..=k_max {
            assert!(slot_bound(lengths.iter().copied(), experts, k).unwrap() <= own);
        }
    }
}

#[test]
fn scaling_table_is_the_recorded_one() {
    let file = testkit::golden::File::open("expert_choice_08").unwrap();
    let want = file.f32s("scaling_factors").unwrap();
    let table = ScalingTable::new(12, 2);
    let got = table.make().unwrap();
    assert_close(&got, &want, 0.0, 0.01, "scaling factors");
    assert_eq!(got, table.make().unwrap());
    assert_ne!(got, ScalingTable { seed: 1, ..table }.make().unwrap());
    // The same on every platform, to the last bit.
    let bits: Vec<u32> = got.iter().map(|s| s.to_bits()).collect();
    assert_eq!([bits[0], bits[1], bits[6], bits[12]], PINNED, "{bits:x?}");

    // From 1 towards sqrt(n / e), the ratio of E[z] to the root of E[z^2] for log-normal z; from above, as the sum of
    // squares has a long tail.
    let wide = ScalingTable { draws: 200, ..ScalingTable::new(512, 1) }.make().unwrap();
    assert_eq!(wide.len(), 513);
    assert!((0..9).all(|i| wide[1 << i] < wide[2 << i]), "{wide:?}");
    assert_close(&wide[512..], &[(512.0f32 / 1f32.exp()).sqrt()], 0.0, 0.1, "many experts");

    for table in [
        ScalingTable::new(0, 2),
        ScalingTable::new(12, 0),
        ScalingTable::new(1025, 1),
        ScalingTable { draws: 0, ..table },
    ] {
        assert!(table.make().is_err(), "{table:?}");
    }
}

const PINNED: [u32; 4] = [0x3f80_0000, 0x3fb5_04f3, 0x402c_ebe2, 0x4064_7317];

#[test]
fn reports() {
    let load = Load::new(&[4, 2, 2, 0]);
    assert_eq!((load.min, load.mean, load.max, load.imbalance()), (0, 2.0, 4, 2.0));
    assert!((load.variation - 0.5f64.sqrt()).abs() < 1e-12);
    for none in [&[][..], &[0, 0]] {
        let load = Load::new(none);
        assert_eq!(
            (load.min, load.mean, load.max, load.variation, load.imbalance()),
            (0, 0.0, 0, 0.0, 1.0)
        );
    }
    let even = Load::new(&[5; 48]);
    assert_eq!((even.variation, even.imbalance()), (0.0, 1.0));

    assert_eq!(slowest_device(&[4, 2, 2, 0], 2).unwrap(), 1.5);
    assert_eq!(slowest_device(&[4, 2, 2, 0], 4).unwrap(), 2.0);
    assert_eq!(slowest_device(&[0, 0, 0, 0], 2).unwrap(), 1.0);
    assert_eq!(slowest_device(&[u32::MAX; 4], 2).unwrap(), 1.0);
    for (loads, devices) in [(&[1, 2, 3][..], 2), (&[1], 0), (&[], 1), (&[1, 1], 4)] {
        assert!(slowest_device(loads, devices).is_err(), "{loads:?} on {devices}");
    }

    let stats = Stats {
        slots: 96,
        dropped: 3,
        untouched: 10,
        tokens_per_expert: (0..48).map(|e| 1 + 2 * u32::from(e < 24)).collect(),
        ..Stats::default()
    };
    let report = Report::new(&stats, 40);
    assert_eq!(
        (report.tokens, report.untouched_share, report.slots, report.dropped),
        (40, 0.25, 96, 3)
    );
    assert_eq!(report.devices, [(2, 1.5), (4, 1.5), (8, 1.5), (16, 1.5)]);
    let padded = report.with_padding(8);
    assert_eq!((padded.tokens, padded.untouched, padded.untouched_share), (32, 2, 0.0625));
    assert_eq!(Report::new(&Stats::default(), 0).untouched_share, 0.0);
}
