//! The running mean of the experts of a block, kept on the device.
use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::prelude::{Output, contexts, gpu};
use wgmoe::ops::expert_union::{self, Args, Dims, ExpertUnion, Totals};

#[test]
fn layers_and_steps_add_up_exactly() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (150usize, 96usize);
    let offsets = [2u32, 34, 34, 66, 60, 140, 400];
    let blocks = offsets.len() - 1;
    let mut rng = StdRng::seed_from_u64(5);
    for ctx in contexts(&gpu) {
        // The low word is about to overflow.
        let mut want = Totals { experts: u64::from(u32::MAX) - 100, blocks: 1 << 33 };
        let words = [want.experts as u32, 0, 0, 2];
        let totals = Output::holding(&gpu, &words);
        let op = ExpertUnion::new(&ctx).expect("a kernel");
        let os = gpu.upload(&offsets);
        for layer in 0..3 {
            let dense = 1 << (layer * 2);
            let assigned: Vec<u32> = (0..experts * tokens.div_ceil(32))
                .map(|_| if rng.random_range(0..dense + 1) == 0 { rng.random() } else { 0 })
                .collect();
            let bits = gpu.upload(&assigned);
            let [members, counts, bytes] =
                [blocks * experts.div_ceil(32), blocks, 2 * blocks].map(|n| Output::u32s(&gpu, n));
            let dims = Dims {
                tokens: tokens as u32,
                experts: experts as u32,
                blocks: blocks as u32,
                expert_bytes: 6 << 20,
            };
            let args = Args {
                assigned: (&bits).into(),
                offsets: (&os).into(),
                members: members.slice(),
                counts: counts.slice(),
                bytes: bytes.slice(),
                totals: Some(totals.slice()),
            };
            let step = op.bind(&dims, args).expect("bind");
            let of = expert_union::cpu(&assigned, tokens, experts, &offsets, 6 << 20).1;
            for _ in 0..2 {
                gpu.run(&step).expect("run");
                want.add(&of, &offsets, tokens);
            }
            assert_eq!(counts.get::<u32>(&gpu), of);
            // Without totals, they stay.
            gpu.run(&op.bind(&dims, Args { totals: None, ..args }).expect("bind")).expect("run");
        }
        let got = Totals::from_words(&totals.get::<u32>(&gpu)).expect("4 words");
        assert_eq!(got, want, "{:?}", ctx.variant());
        assert!(got.experts > u64::from(u32::MAX), "the carry was not tested");
        assert!(
            op.bind(
                &Dims { tokens: 1, experts: 1, blocks: 1, expert_bytes: 1 },
                Args {
                    assigned: totals.slice(),
                    offsets: totals.slice(),
                    members: totals.slice(),
                    counts: totals.slice(),
                    bytes: totals.slice(),
                    totals: Some((&os).into()),
                },
            )
            .is_err()
        );
    }
}

#[test]
fn a_mean_over_nothing_is_zero() {
    assert_eq!(Totals::default().mean(), 0.0);
    assert_eq!(Totals { experts: 7, blocks: 2 }.mean(), 3.5);
    assert!(Totals::from_words(&[0; 3]).is_err());
}
