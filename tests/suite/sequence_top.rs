//! The highest pairs of sequences, exact.
use testkit::prelude::{Output, assert_same, contexts, gpu, random, run};
use wgmoe::ops::sequence_top::{Args, Dims, SequenceTop, cpu};
use wgmoe::plan::bits;
use wgmoe::{Context, Gpu};

fn on(
    gpu: &Gpu,
    ctx: &Context,
    r: &[f32],
    experts: usize,
    top: usize,
    offsets: &[u32],
) -> Vec<u32> {
    let tokens = r.len() / experts;
    let (rs, os) = (gpu.upload(r), gpu.upload(offsets));
    let assigned = Output::u32s(gpu, experts * bits::columns(tokens));
    let dims = Dims {
        tokens: tokens as u32,
        experts: experts as u32,
        sequences: offsets.len() as u32 - 1,
        experts_per_token: top as u32,
    };
    let args = Args { values: (&rs).into(), offsets: (&os).into(), assigned: assigned.slice() };
    run(gpu, &SequenceTop::new(ctx).expect("a kernel").bind(&dims, args).expect("bind"));
    assigned.get(gpu)
}

#[track_caller]
fn check(gpu: &Gpu, what: &str, r: &[f32], experts: usize, top: usize, offsets: &[u32]) {
    let want = cpu(r, experts, top, offsets);
    for ctx in contexts(gpu) {
        let got = on(gpu, &ctx, r, experts, top, offsets);
        let what = format!("{what}: E {experts}, top {top}, {offsets:?}, {:?}", ctx.variant());
        assert_same(&got, &want, &what);
    }
}

#[test]
fn ragged_sequences_match_the_twin() {
    let Some(gpu) = gpu() else { return };
    for (i, experts) in [1usize, 40, 64, 96, 256, 384].into_iter().enumerate() {
        for tokens in [1u32, 5, 31, 33, 64, 300] {
            let r = random(i as u64 * 1000 + u64::from(tokens), tokens as usize * experts);
            let t = tokens;
            let ragged = [
                vec![0, t],
                vec![0, t / 3, t / 3, t - t / 4, t],
                // Before, behind, decreasing, past the end.
                vec![t / 5, t / 2, t / 4, t * 3 / 4],
                vec![t / 2, t / 2],
                vec![0, t / 2, 4_000_000_000],
                vec![t, t],
            ];
            for offsets in &ragged {
                check(&gpu, "random", &r, experts, experts.min(8), offsets);
            }
            check(&gpu, "one", &r, experts, 1, &ragged[1]);
            check(&gpu, "all", &r, experts, experts, &ragged[1]);
        }
    }
}

#[test]
fn ties_and_odd_values() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (700, 40);
    let few: Vec<f32> =
        random(1, tokens * experts).into_iter().map(|x| (x * 2.0).round()).collect();
    let odd: Vec<f32> = random(2, tokens * experts)
        .into_iter()
        .enumerate()
        .map(|(i, x)| match (i * 7919) % 11 {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => -0.0,
            4 => 0.0,
            5 => 1e-40,
            _ => x,
        })
        .collect();
    for offsets in [&[0, 700][..], &[3, 100, 101, 517, 690]] {
        for top in [1, 7, 33, 40] {
            check(&gpu, "equal", &vec![0.5; tokens * experts], experts, top, offsets);
            check(&gpu, "ties", &few, experts, top, offsets);
            check(&gpu, "odd", &odd, experts, top, offsets);
            check(&gpu, "NaN", &vec![f32::NAN; tokens * experts], experts, top, offsets);
        }
    }
}

#[test]
fn many_pieces() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts) in [(5000usize, 64usize), (40_000, 8), (1100, 1024)] {
        let r = random(tokens as u64, tokens * experts);
        let t = tokens as u32;
        check(&gpu, "long", &r, experts, 2, &[0, t]);
        check(&gpu, "long", &r, experts, 2, &[0, t / 7, t / 7 + 1, t / 2 + 3, t - 1]);
        let coarse: Vec<f32> = r.iter().map(|x| (x * 3.0).round()).collect();
        check(&gpu, "long ties", &coarse, experts, 3, &[5, t / 2, t]);
    }
}

#[test]
fn wrong_numbers_are_errors() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let op = SequenceTop::new(ctx).expect("a kernel");
    let [r, offsets, assigned] = [32 * 8, 2, 8].map(|n| Output::u32s(&gpu, n));
    let args = Args { values: r.slice(), offsets: offsets.slice(), assigned: assigned.slice() };
    let dims = Dims { tokens: 32, experts: 8, sequences: 1, experts_per_token: 2 };
    assert_eq!(op.bind(&dims, args).expect("bind").dispatches().len(), 5);
    for wrong in [
        Dims { sequences: 0, ..dims },
        Dims { sequences: 2, ..dims },
        Dims { experts: 0, ..dims },
        Dims { experts_per_token: 0, ..dims },
        Dims { experts_per_token: 9, ..dims },
        Dims { tokens: 33, ..dims },
    ] {
        assert!(op.bind(&wrong, args).is_err(), "{wrong:?}");
    }
    assert!(op.bind(&Dims { tokens: 0, ..dims }, args).expect("no work").dispatches().is_empty());
}
