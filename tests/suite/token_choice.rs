use testkit::{cases, prelude::*};
use wgmoe::ops::token_choice::{Args, Coresets, Dims, TokenChoice, cpu};
use wgmoe::plan::bits;
use wgmoe::routing::Groups;
use wgmoe::{Context, Gpu, Target};

/// What is chosen from.
struct Choice<'a> {
    r: &'a [f32],
    experts: usize,
    top: usize,
    groups: Option<Groups>,
    /// (bit set of each block, block of each token)
    coresets: Option<(&'a [u32], &'a [u32])>,
}

impl Choice<'_> {
    fn run(&self, gpu: &Gpu, ctx: &Context) -> Vec<u32> {
        let tokens = self.r.len() / self.experts;
        let assigned = Output::holding(gpu, &cases::stale(8, self.experts * bits::columns(tokens)));
        let r = gpu.upload(self.r);
        let sets = self.coresets.map(|(sets, of)| (gpu.upload(sets), gpu.upload(of), sets.len()));
        let coresets = sets.as_ref().map(|(coreset, block_of, words)| Coresets {
            blocks: (words / self.experts.div_ceil(32)) as u32,
            coreset: coreset.into(),
            block_of: block_of.into(),
        });
        let op = TokenChoice::new(ctx, self.experts as u32, self.top as u32, self.groups).unwrap();
        let args = Args {
            experts_per_token: None,
            values: (&r).into(),
            coresets,
            assigned: assigned.slice(),
        };
        run(gpu, &op.bind(&Dims { tokens: tokens as u32 }, args).unwrap());
        assigned.get(gpu)
    }

    fn twin(&self) -> Vec<u32> {
        let words = self.experts.div_ceil(32);
        cpu(self.r, self.experts, self.top, self.groups, &|t, e| match self.coresets {
            None => true,
            Some((sets, block_of)) => sets
                .chunks_exact(words)
                .nth(block_of[t] as usize)
                .is_some_and(|s| s[e / 32] >> (e % 32) & 1 == 1),
        })
    }
}

#[test]
fn every_top() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts) in [(1, 1), (33, 5), (40, 40), (31, 64), (65, 96), (17, 384), (35, 1024)]
    {
        for top in [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64] {
            for (seed, kind) in cases::KINDS.iter().enumerate() {
                if top > experts {
                    continue;
                }
                let r = cases::values(kind, seed as u64, tokens * experts);
                let choice = Choice { r: &r, experts, top, groups: None, coresets: None };
                let twin = choice.twin();
                for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
                    let what =
                        format!("{} {kind} T {tokens} E {experts} K {top}", variant_name(&ctx));
                    assert_same(&choice.run(&gpu, &ctx), &twin, &what);
                }
            }
        }
    }
}

#[test]
fn groups() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, top, count, group_top) in [
        (40, 256, 8, 8, 4),
        (64, 48, 6, 4, 2),
        (33, 40, 8, 5, 1),
        (33, 40, 8, 5, 5),
        (31, 32, 3, 32, 3), // groups of one, and fewer of them than K
        (40, 4, 2, 4, 2),
        (40, 4, 1, 4, 3),
        (17, 16, 8, 16, 8),
        (5, 6, 4, 3, 2), // all experts of the groups
        (17, 1024, 16, 32, 5),
        (17, 1024, 64, 32, 32),
        (17, 96, 4, 1, 1),
    ] {
        for (seed, kind) in cases::KINDS.iter().enumerate() {
            let r = cases::values(kind, seed as u64, tokens * experts);
            let groups = Some(Groups::new(count, group_top));
            let choice = Choice { r: &r, experts, top, groups, coresets: None };
            let twin = choice.twin();
            for ctx in contexts(&gpu) {
                let what = format!("{} {kind} E {experts} K {top} {groups:?}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx), &twin, &what);
            }
        }
    }
}

#[test]
fn a_group_of_one_is_valued_by_its_expert() {
    let Some(gpu) = gpu() else { return };
    // As many groups as experts: the choice is that without groups, NaN and all.
    for (seed, kind) in cases::KINDS.iter().enumerate() {
        let r = cases::values(kind, seed as u64, 40 * 4);
        let groups = Some(Groups::new(4, 2));
        let want = cpu(&r, 4, 2, None, &|_, _| true);
        for ctx in contexts(&gpu) {
            let choice = Choice { r: &r, experts: 4, top: 2, groups, coresets: None };
            assert_same(&choice.run(&gpu, &ctx), &want, &format!("{} {kind}", variant_name(&ctx)));
        }
    }
    // Larger groups still need two: of the first only one expert is eligible.
    let r = [9.0, 9.0, 1.0, 1.0];
    let groups = Some(Groups::new(2, 1));
    let coresets = Some((&[0b1101][..], &[0][..]));
    for ctx in contexts(&gpu) {
        let choice = Choice { r: &r, experts: 4, top: 1, groups, coresets };
        assert_same(&choice.run(&gpu, &ctx), &[0, 0, 1, 0], &variant_name(&ctx));
    }
}

#[test]
fn coresets() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, top, groups) in [
        (70usize, 64usize, 8, None),
        (70, 40, 4, None),
        (70, 256, 8, Some(Groups::new(8, 4))),
        (45, 48, 6, Some(Groups::new(4, 2))),
    ] {
        // Blocks of every kind: no expert, fewer than K, all, random; some tokens name a block that is none.
        let words = experts.div_ceil(32);
        let mut sets = vec![0u32; 2 * words];
        sets[words] = 0b1011; // three experts
        sets.extend(vec![u32::MAX; words]);
        sets.extend(cases::stale(3, 2 * words));
        let block_of: Vec<u32> = (0..tokens as u32)
            .map(|t| [0, 1, 2, 3, 4, 5, u32::MAX][(t / 6 % 7) as usize])
            .collect();
        for (seed, kind) in cases::KINDS.iter().enumerate() {
            let r = cases::values(kind, seed as u64, tokens * experts);
            let choice = Choice { r: &r, experts, top, groups, coresets: Some((&sets, &block_of)) };
            let twin = choice.twin();
            assert!(
                (0..6).all(|t| bits::experts_of(&twin, tokens, t).is_empty()),
                "an empty coreset"
            );
            for ctx in contexts(&gpu) {
                let what = format!("{} {kind} E {experts} K {top} {groups:?}", variant_name(&ctx));
                assert_same(&choice.run(&gpu, &ctx), &twin, &what);
            }
        }
    }
}

#[test]
fn long_batches() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, top, groups) in
        [(65_537, 8, 2, None), (2_100_000, 1, 1, None), (4096, 256, 8, Some(Groups::new(8, 4)))]
    {
        let r = cases::values("random", 1, tokens * experts);
        let choice = Choice { r: &r, experts, top, groups, coresets: None };
        let twin = choice.twin();
        for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
            assert_same(
                &choice.run(&gpu, &ctx),
                &twin,
                &format!("{} T {tokens}", variant_name(&ctx)),
            );
        }
    }
}

#[test]
fn permuting_tokens_permutes_the_choice() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (77, 40);
    let r = cases::values("ties", 3, tokens * experts);
    let order = cases::permutation(5, tokens);
    let permuted: Vec<f32> =
        order.iter().flat_map(|&t| r[t * experts..][..experts].to_vec()).collect();
    for ctx in contexts(&gpu).into_iter().filter(|c| c.variant().target == Target::Wide) {
        let of =
            |r: &[f32]| Choice { r, experts, top: 5, groups: None, coresets: None }.run(&gpu, &ctx);
        let (plain, permuted) = (of(&r), of(&permuted));
        for (now, &before) in order.iter().enumerate() {
            let (a, b) = (
                bits::experts_of(&permuted, tokens, now),
                bits::experts_of(&plain, tokens, before),
            );
            assert_eq!(a, b, "token {before}");
        }
    }
}
