//! Coresets of blocks: exact against the twin, and the twin against what the rules say.
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use testkit::prelude::{Output, assert_same, contexts, gpu, random, run};
use testkit::rules::every_block_rule;
use wgmoe::ops::{coreset, token_choice};
use wgmoe::plan::bits;
use wgmoe::{BlockRule, Context, Gpu};

/// What each token would choose over all experts, or nothing where the rule does not ask.
fn own_choice(rule: BlockRule, r: &[f32], experts: usize, top: usize) -> Vec<u32> {
    match rule.own_top(top as u32) {
        Some(k) => token_choice::cpu(r, experts, (k as usize).min(experts), None, &|_, _| true),
        None => vec![],
    }
}

struct Case<'a> {
    rule: BlockRule,
    r: &'a [f32],
    experts: usize,
    own: &'a [u32],
    offsets: &'a [u32],
    voters: Option<&'a [u32]>,
}

impl Case<'_> {
    fn cpu(&self) -> (Vec<u32>, Vec<u32>) {
        coreset::cpu(self.rule, self.r, self.experts, self.own, self.offsets, self.voters)
    }

    fn on(&self, gpu: &Gpu, ctx: &Context) -> (Vec<u32>, Vec<u32>) {
        let tokens = self.r.len() / self.experts;
        let blocks = self.offsets.len() - 1;
        let [r, offsets] = [gpu.upload(self.r), gpu.upload(self.offsets)];
        let own = (!self.own.is_empty()).then(|| gpu.upload(self.own));
        let voters = self.voters.map(|m| gpu.upload(m));
        let members = Output::u32s(gpu, blocks * self.experts.div_ceil(32));
        let block_of = Output::holding(gpu, &vec![77u32; tokens]);
        let args = coreset::Args {
            refresh: None,
            values: (&r).into(),
            own_choice: own.as_ref().map(Into::into),
            offsets: (&offsets).into(),
            voters: voters.as_ref().map(Into::into),
            members: members.slice(),
            block_of: block_of.slice(),
        };
        let op = coreset::Coreset::new(ctx, self.experts as u32, self.rule).expect("a rule");
        run(
            gpu,
            &op.bind(&coreset::Dims { tokens: tokens as u32, blocks: blocks as u32 }, args)
                .expect("bind"),
        );
        (members.get(gpu), block_of.get(gpu))
    }

    /// Every variant against the twin.
    #[track_caller]
    fn check(&self, gpu: &Gpu, what: &str) {
        let want = self.cpu();
        for ctx in contexts(gpu) {
            let what = format!("{what}: {:?}, E {}, {:?}", self.rule, self.experts, ctx.variant());
            let got = self.on(gpu, &ctx);
            assert_same(&got.0, &want.0, &format!("{what}: members"));
            assert_same(&got.1, &want.1, &format!("{what}: block_of"));
        }
    }
}

/// Every rule at many counts.
fn rules(experts: u32) -> Vec<BlockRule> {
    let mass = |p, floor| BlockRule::mass(p).with_floor(floor);
    let mut all = every_block_rule(experts, 6).to_vec();
    all.extend([
        mass(0.0, 1),
        mass(0.0, 0),
        mass(0.4, 16),
        mass(0.8, 1),
        mass(0.99, 2),
        mass(1.0, 8),
        mass(1.0, experts),
        mass(1.0, 1),
        mass(0.3, experts),
    ]);
    for n in [1, 2, experts - 1, experts] {
        all.extend([BlockRule::Capacity(n), BlockRule::Vote(n)]);
    }
    all.extend([1, 8].map(BlockRule::Union));
    all
}

/// Scores of the kinds that awkward models give.
fn scores(seed: u64, kind: usize, tokens: usize, experts: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut r = random(seed, tokens * experts);
    match kind {
        // Sigmoids.
        0 => r.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-4.0 * *x).exp())),
        // Few values: votes tie.
        1 => r.iter_mut().for_each(|x| *x = (*x * 3.0).round() / 4.0),
        // All equal.
        2 => r.fill(0.25),
        // Negative votes.
        3 => r.iter_mut().for_each(|x| *x = -x.abs() - 0.01),
        // Zeros of both signs.
        4 => r.iter_mut().for_each(|x| *x = if *x < 0.0 { -0.0 } else { 0.0 }),
        // Anything at all, a token of NaNs among it.
        5 => {
            let odd = [
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                1e30,
                -1e30,
                1e-40,
                3000.0,
                -2047.5,
                2.5 / 16_777_216.0,
            ];
            for x in &mut r {
                if rng.random_range(0..4) == 0 {
                    *x = odd[rng.random_range(0..odd.len())];
                }
            }
            let t = rng.random_range(0..tokens);
            r[t * experts..][..experts].fill(f32::NAN);
        }
        // Small scores, as of a softmax over many experts.
        6 => r.iter_mut().for_each(|x| *x = (x.abs() + 0.5) / experts as f32 * 1e-3),
        // NaN throughout.
        _ => r.fill(f32::NAN),
    }
    r
}

#[test]
fn every_rule_matches_the_twin() {
    let Some(gpu) = gpu() else { return };
    for (i, experts) in [40usize, 64, 96, 256, 384].into_iter().enumerate() {
        // Ragged, aligned to nothing; a block without tokens; tokens before, behind and past the blocks' order.
        let offsets = [3u32, 4, 9, 40, 40, 73, 137, 130, 180];
        for kind in 0..8 {
            let r = scores((i * 10 + kind) as u64, kind, 190, experts);
            let some = rules(experts as u32);
            for (j, rule) in some.iter().enumerate() {
                // All kinds meet all rules over the sizes, not at every size.
                if i != 1 && (j + kind + i) % 5 != 0 {
                    continue;
                }
                let own = own_choice(*rule, &r, experts, 6);
                Case { rule: *rule, r: &r, experts, own: &own, offsets: &offsets, voters: None }
                    .check(&gpu, &format!("scores {kind}"));
            }
        }
    }
}

#[test]
fn long_blocks_and_many_experts() {
    let Some(gpu) = gpu() else { return };
    for (experts, tokens) in [(1024usize, 1024usize), (256, 1025), (40, 256), (1, 33)] {
        for kind in [0, 5] {
            let r = scores(7 + kind as u64, kind, tokens, experts);
            // Longer than what has a say, where it is 1,025.
            for rule in every_block_rule(experts as u32, 4) {
                let own = own_choice(rule, &r, experts, 4.min(experts));
                Case {
                    rule,
                    r: &r,
                    experts,
                    own: &own,
                    offsets: &[0, tokens as u32],
                    voters: None,
                }
                .check(&gpu, "one block");
            }
        }
    }
}

/// As in prefill: thousands of blocks, of 1 to 3 tokens each.
#[test]
fn many_blocks_in_one_dispatch() {
    let Some(gpu) = gpu() else { return };
    let (experts, blocks) = (40, 3000u32);
    let offsets: Vec<u32> = (0..=blocks).map(|b| 2 * b + b % 3 % 2).collect();
    let r = scores(31, 0, 2 * blocks as usize, experts);
    for rule in [BlockRule::mass(0.6).with_floor(2), BlockRule::Capacity(5), BlockRule::Union(2)] {
        let own = own_choice(rule, &r, experts, 4);
        Case { rule, r: &r, experts, own: &own, offsets: &offsets, voters: None }
            .check(&gpu, "many blocks");
    }
}

/// Sums that need more than 32 bits, and as many loop iterations as there can be.
#[test]
fn the_heaviest_block() {
    let Some(gpu) = gpu() else { return };
    let tokens = 1024;
    let values = [(2047.0, 1.0), (-2047.0, 1.0), (1e9, -1e9)];
    for (experts, (value, last)) in [1024, 256].into_iter().flat_map(|e| values.map(|v| (e, v))) {
        let mut r = vec![value; tokens * experts];
        for (i, x) in r.iter_mut().enumerate().filter(|(i, _)| i % 7 == 0) {
            *x = last * (i % 13) as f32;
        }
        let own = vec![u32::MAX; tokens.div_ceil(32) * experts];
        for rule in [
            BlockRule::mass(0.5).with_floor(1),
            BlockRule::mass(0.9999).with_floor(1),
            BlockRule::mass(1.0).with_floor(1),
            BlockRule::Vote(experts as u32 - 25),
            BlockRule::Capacity(experts as u32 / 2),
        ] {
            Case { rule, r: &r, experts, own: &own, offsets: &[0, 1024], voters: None }
                .check(&gpu, "heavy");
        }
    }
}

#[test]
fn blocks_of_every_length_and_marks() {
    let Some(gpu) = gpu() else { return };
    let experts = 64;
    let mut rng = StdRng::seed_from_u64(3);
    for length in [1usize, 5, 31, 32, 33, 64, 256] {
        let (before, tokens) = (rng.random_range(0..40), 3 * length + 50);
        let offsets: Vec<u32> = (0..4).map(|b| (before + b * length) as u32).collect();
        let r = scores(length as u64, 0, tokens, experts);
        // No mark in the second block.
        let voters: Vec<u32> = (0..tokens)
            .map(|t| {
                let second = (offsets[1]..offsets[2]).contains(&(t as u32));
                if second { 0 } else { rng.random_range(0..3u32) * 0x1000 }
            })
            .collect();
        for rule in every_block_rule(experts as u32, 4) {
            let own = own_choice(rule, &r, experts, 4);
            for voters in [None, Some(&voters[..])] {
                let case = Case { rule, r: &r, experts, own: &own, offsets: &offsets, voters };
                case.check(&gpu, &format!("blocks of {length}"));
                if voters.is_some() {
                    assert_eq!(&case.cpu().0[2..4], [u32::MAX; 2], "no marked token: all experts");
                }
            }
        }
    }
}

/// A block that crossed from one request to the other would elect something else.
#[test]
fn requests_packed_side_by_side_elect_as_they_would_alone() {
    let Some(gpu) = gpu() else { return };
    let experts = 96;
    let r = scores(21, 0, 32, experts);
    let (first, second) = r.split_at(13 * experts);
    for rule in rules(96) {
        for ctx in contexts(&gpu) {
            let alone = |r: &[f32]| {
                let own = own_choice(rule, r, experts, 6);
                let offsets = [0, (r.len() / experts) as u32];
                Case { rule, r, experts, own: &own, offsets: &offsets, voters: None }.on(&gpu, &ctx)
            };
            let own = own_choice(rule, &r, experts, 6);
            let both =
                Case { rule, r: &r, experts, own: &own, offsets: &[0, 13, 32], voters: None }
                    .on(&gpu, &ctx);
            assert_eq!(both.0, [alone(first).0, alone(second).0].concat(), "{rule:?}");
        }
    }
    // And so they route: the coresets, then each token's choice inside its own, with groups.
    let groups = Some(wgmoe::routing::Groups::new(8, 4));
    for rule in rules(96) {
        for ctx in contexts(&gpu) {
            let route = |r: &[f32], offsets: &[u32]| -> Vec<Vec<usize>> {
                let tokens = r.len() / experts;
                let own = own_choice(rule, r, experts, 6);
                let (members, block_of) =
                    Case { rule, r, experts, own: &own, offsets, voters: None }.on(&gpu, &ctx);
                let assigned = Output::u32s(&gpu, experts * bits::columns(tokens));
                let [rs, ms, bs] = [gpu.upload(r), gpu.upload(&members), gpu.upload(&block_of)];
                let args = token_choice::Args {
                    experts_per_token: None,
                    values: (&rs).into(),
                    coresets: Some(token_choice::Coresets {
                        blocks: offsets.len() as u32 - 1,
                        coreset: (&ms).into(),
                        block_of: (&bs).into(),
                    }),
                    assigned: assigned.slice(),
                };
                let op = token_choice::TokenChoice::new(&ctx, experts as u32, 6, groups)
                    .expect("a choice");
                run(
                    &gpu,
                    &op.bind(&token_choice::Dims { tokens: tokens as u32 }, args).expect("bind"),
                );
                let assigned: Vec<u32> = assigned.get(&gpu);
                (0..tokens).map(|t| bits::experts_of(&assigned, tokens, t)).collect()
            };
            let alone = [route(first, &[0, 13]), route(second, &[0, 19])].concat();
            assert_eq!(route(&r, &[0, 13, 32]), alone, "{rule:?}");
        }
    }
    let rule = BlockRule::Vote(18);
    let own = own_choice(rule, &r, experts, 6);
    let case =
        |offsets: &[u32]| Case { rule, r: &r, experts, own: &own, offsets, voters: None }.cpu().0;
    assert_ne!(case(&[0, 13, 32]), case(&[0, 14, 32]), "this test must be able to fail");
}

#[test]
fn the_order_of_tokens_changes_nothing() {
    let Some(gpu) = gpu() else { return };
    let (experts, tokens) = (64, 77);
    for kind in [0, 1, 5] {
        let r = scores(50 + kind as u64, kind, tokens, experts);
        let mut order: Vec<usize> = (0..tokens).collect();
        order.shuffle(&mut StdRng::seed_from_u64(9));
        let shuffled: Vec<f32> =
            order.iter().flat_map(|&t| r[t * experts..][..experts].to_vec()).collect();
        for rule in rules(64) {
            let [a, b] =
                [own_choice(rule, &r, experts, 4), own_choice(rule, &shuffled, experts, 4)];
            let offsets = [0, tokens as u32];
            for ctx in contexts(&gpu) {
                let on = |r: &[f32], own: &[u32]| {
                    Case { rule, r, experts, own, offsets: &offsets, voters: None }.on(&gpu, &ctx)
                };
                assert_eq!(on(&r, &a), on(&shuffled, &b), "{rule:?}, scores {kind}");
                assert_eq!(on(&r, &a), on(&r, &a), "{rule:?}: twice");
            }
        }
    }
}

/// The twin, by hand.
#[test]
fn the_twin_elects_what_the_rules_say() {
    let experts = 4;
    // Votes, of two tokens that chose two each: .5 + .25, .125, .5, none.
    let r = [0.5, 0.0, 0.5, 0.0, 0.25, 0.125, 0.0, 0.0];
    let mut own = bits::empty(2, experts);
    for (e, t) in [(0, 0), (2, 0), (0, 1), (1, 1)] {
        bits::set(&mut own, 2, e, t);
    }
    let elect = |rule| {
        let (members, block_of) = coreset::cpu(rule, &r, experts, &own, &[0, 2], None);
        assert_eq!(block_of, [0, 0]);
        members[0]
    };
    let mass = |p, floor| elect(BlockRule::Mass { p, floor });
    assert_eq!(mass(0.0, 0), 0b0001);
    // 6 of 11: kept while at most p, and the one that crosses.
    assert_eq!(mass(0.5, 0), 0b0001);
    assert_eq!(mass(0.55, 0), 0b0101);
    assert_eq!(mass(0.95, 0), 0b0111);
    assert_eq!(mass(1.0, 0), 0b0111);
    assert_eq!(mass(0.0, 2), 0b0101);
    assert_eq!(mass(1.0, 4), 0b1111);
    assert_eq!(elect(BlockRule::Vote(2)), 0b0101);
    assert_eq!(elect(BlockRule::Vote(4)), 0b1111);
    assert_eq!(elect(BlockRule::Capacity(1)), 0b0001);
    assert_eq!(elect(BlockRule::Capacity(3)), 0b0111);
    assert_eq!(elect(BlockRule::Union(2)), 0b0111);

    // The first prefix at the share exactly is not past it.
    let halves = |p| {
        let own = [1, 1];
        coreset::cpu(BlockRule::Mass { p, floor: 1 }, &[0.5, 0.5], 2, &own, &[0, 1], None).0[0]
    };
    assert_eq!(halves(0.5), 0b11);
    assert_eq!(halves(0.499), 0b01);

    // Votes that sum to 0 or less, and none at all: the floor.
    let negative = |r: [f32; 2], own: [u32; 2]| {
        coreset::cpu(BlockRule::mass(0.9).with_floor(1), &r, 2, &own, &[0, 1], None).0[0]
    };
    assert_eq!(negative([-0.5, -0.25], [1, 1]), 0b10);
    assert_eq!(negative([f32::NAN, f32::NAN], [1, 1]), 0b01);
    assert_eq!(negative([0.5, 0.5], [0, 0]), 0b01);

    assert_eq!(coreset::vote(0.5), 1 << 23);
    assert_eq!(coreset::vote(f32::NAN), 0);
    assert_eq!(coreset::vote(f32::INFINITY), 2047 << 24);
    assert_eq!(coreset::vote(2.5 / 16_777_216.0), 2);
    assert_eq!(coreset::vote(-1.5 / 16_777_216.0), -2);
}

#[test]
fn wrong_rules_and_slices_are_errors() {
    let mass = |p, floor| BlockRule::mass(p).with_floor(floor).check(8);
    assert!(mass(0.6, 8).is_ok() && mass(0.0, 0).is_ok() && mass(1.0, 1).is_ok());
    for p in [f32::NAN, -0.1, 1.000_001, 60.0, f32::INFINITY] {
        assert!(mass(p, 1).is_err(), "{p}");
    }
    assert!(mass(0.5, 9).is_err());
    for rule in [BlockRule::Capacity, BlockRule::Vote, BlockRule::Union] {
        assert!(rule(0).check(8).is_err() && rule(9).check(8).is_err() && rule(8).check(8).is_ok());
    }
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    assert!(coreset::Coreset::new(ctx, 8, BlockRule::Vote(9)).is_err());
    assert!(coreset::Coreset::new(ctx, 0, BlockRule::Vote(1)).is_err());
    let op = coreset::Coreset::new(ctx, 8, BlockRule::Vote(2)).expect("a rule");
    let buffers: Vec<_> = [32 * 8, 2, 8, 1, 32].map(|n| Output::u32s(&gpu, n)).into();
    let args = coreset::Args {
        refresh: None,
        values: buffers[0].slice(),
        own_choice: Some(buffers[2].slice()),
        offsets: buffers[1].slice(),
        voters: None,
        members: buffers[3].slice(),
        block_of: buffers[4].slice(),
    };
    let dims = coreset::Dims { tokens: 32, blocks: 1 };
    assert!(op.bind(&dims, args).is_ok());
    assert!(op.bind(&dims, coreset::Args { own_choice: None, ..args }).is_err());
    assert!(op.bind(&dims, coreset::Args { voters: Some(buffers[1].slice()), ..args }).is_err());
    assert!(op.bind(&coreset::Dims { tokens: 32, blocks: 0 }, args).is_err());
    assert!(op.bind(&coreset::Dims { tokens: 32, blocks: 2 }, args).is_err());
    assert!(
        op.bind(&coreset::Dims { tokens: 0, blocks: 1 }, args)
            .expect("no work")
            .dispatches()
            .is_empty()
    );
}
