//! How far coresets cover what their tokens would take of all experts.
use testkit::layer::{HostLayer, selection};
use testkit::prelude::*;
use testkit::rules::every_block_rule;
use wgmoe::layer::{Batch, Blocks, LayerConfig, MoeRouting};
use wgmoe::ops::coverage::{Args, Coverage, Dims, cpu};
use wgmoe::ops::token_choice;
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, Score, TokenChoice};
use wgmoe::{Context, Gpu};

fn words(seed: u64, len: usize) -> Vec<u32> {
    random(seed, len).iter().map(|v| v.to_bits().wrapping_mul(0x9e37_79b1)).collect()
}

fn check(gpu: &Gpu, ctx: &Context, [tokens, experts]: [usize; 2], offsets: &[u32]) {
    let blocks = offsets.len() - 1;
    let what = format!("{} T {tokens} E {experts} {blocks} blocks", variant_name(ctx));
    // Bits past the last token and the last expert are set, too.
    let own = words(1, experts * tokens.div_ceil(32));
    let members = words(2, blocks * experts.div_ceil(32));
    let [own_buffer, members_buffer, offsets_buffer] =
        [&own[..], &members, offsets].map(|words| gpu.upload(words));
    let out = Output::u32s(gpu, 2 * blocks);
    let dims = Dims { tokens: tokens as u32, experts: experts as u32, blocks: blocks as u32 };
    let args = Args {
        own_choice: (&own_buffer).into(),
        members: (&members_buffer).into(),
        offsets: (&offsets_buffer).into(),
        coverage: out.slice(),
    };
    run(gpu, &Coverage::new(ctx).unwrap().bind(&dims, args).unwrap());
    let want = cpu(&own, tokens, experts, &members, offsets).concat();
    assert!(tokens == 1 || want.iter().any(|&n| n > 0), "{what}");
    assert_same(&out.get::<u32>(gpu), &want, &what);
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        check(&gpu, &ctx, [1, 1], &[0, 1]);
        check(&gpu, &ctx, [33, 40], &[0, 7, 7, 33]);
        check(&gpu, &ctx, [300, 257], &[5, 40, 30, 64, 200, 999]);
        check(&gpu, &ctx, [4000, 1000], &[0, 3000, 4000]);
    }
}

const D: u32 = 48;
const E: u32 = 40;
const K: u32 = 4;

/// A layer's coverage of coresets that one block keeps and another elects, of active tokens with their own numbers
/// of experts; the same of few tokens at once and of more in three kernels.
#[test]
fn of_kept_coresets() {
    let Some(gpu) = gpu() else { return };
    for offsets in [&[0u32, 12, 32][..], &[0, 12, 40, 70]] {
        let (tokens, blocks) = (offsets[offsets.len() - 1] as usize, offsets.len() - 1);
        for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
            for (i, rule) in every_block_rule(E, K).into_iter().enumerate() {
                let plain = TokenChoice::new(K).with_score(Score::Sigmoid);
                let choice = if i % 2 == 0 { plain.with_groups(8, 4) } else { plain };
                let groups = if i % 2 == 0 { choice.groups } else { None };
                let config = LayerConfig::new(D, 16, E, choice.with_coreset(rule));
                let host = HostLayer::scripted(config);
                let op = MoeRouting::new(&ctx, config, host.router(&ctx).unwrap()).unwrap();
                let active = words(3, tokens.div_ceil(32));
                let tops: Vec<u32> = (0..tokens as u32).map(|t| t % (K + 2)).collect();
                let given = words(4, blocks * 2);
                let refresh: Vec<u32> = (0..blocks as u32).map(|b| b % 2).collect();
                let buffers = [&active[..], &tops, &refresh, offsets].map(|all| gpu.upload(all));
                let [active_buffer, tops_buffer, refresh_buffer, at] = &buffers;
                let hidden = gpu.upload(&random(5, tokens * D as usize));
                let (coresets, coverage) =
                    (Output::holding(&gpu, &given), Output::u32s(&gpu, 2 * blocks));
                let of = Blocks::new(blocks as u32, at)
                    .with_kept(coresets.slice(), refresh_buffer)
                    .with_coverage(coverage.slice());
                let batch = Batch::new(&hidden, tokens as u32)
                    .with_active(active_buffer)
                    .with_experts_per_token(tops_buffer)
                    .with_blocks(of);
                let bound = op.bind(&batch).unwrap();
                gpu.run_layer(&bound).unwrap();
                let [.., values] = selection(&bound).unwrap();
                let values: Vec<f32> = gpu.download(values).unwrap();
                let values = &values[..tokens * E as usize];
                let is_active = |t: usize, _: usize| active[t / 32] >> (t % 32) & 1 == 1;
                let (e, k) = (E as usize, K as usize);
                let own = token_choice::cpu_each(values, e, k, &tops, groups, &is_active);
                let members: Vec<u32> = coresets.get(&gpu);
                assert_eq!(members[..2], given[..2], "{rule:?}: the first block keeps");
                let want = cpu(&own, tokens, e, &members, offsets).concat();
                let what = format!("{} {rule:?} {offsets:?}", variant_name(&ctx));
                assert_same(&coverage.get::<u32>(&gpu), &want, &what);
                assert!(want[1] < want[0], "{what}: a given coreset covers less than all");

                // What the tokens took lies inside, and is what is covered where the own choice is.
                let assigned: Vec<u32> = gpu.download(bound.assigned().unwrap()).unwrap();
                let block_of: Vec<u32> = (0..tokens as u32)
                    .map(|t| offsets[1..].partition_point(|&end| end <= t) as u32)
                    .collect();
                let assigned = &assigned[..e * bits::columns(tokens)];
                for t in 0..tokens {
                    for e in bits::experts_of(assigned, tokens, t) {
                        let word = members[block_of[t] as usize * 2 + e / 32];
                        assert_eq!(word >> (e % 32) & 1, 1, "{what}: token {t}, expert {e}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let choice = TokenChoice::new(K).with_coreset(BlockRule::vote(9));
    let host = HostLayer::scripted(LayerConfig::new(D, 16, E, choice));
    let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
    let hidden = gpu.upload(&random(1, 20 * D as usize));
    let [at, short] = [&[0u32, 9, 20][..], &[0; 3]].map(|words| gpu.upload(words));
    let blocks = Blocks::new(2, &at).with_coverage(&short);
    let error = op.bind(&Batch::new(&hidden, 20).with_blocks(blocks)).unwrap_err().to_string();
    assert_eq!(error, "`coverage`: expected 16 bytes, [2, 2] u32, got 12");
}
