//! Coresets that a block keeps from step to step, or that the caller gives.
use testkit::layer::{HostLayer, selection};
use testkit::prelude::*;
use testkit::rules::every_block_rule;
use wgmoe::layer::{Batch, Blocks, BoundLayer, HostBatch, HostBlocks, LayerConfig, MoeRouting};
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, Routing, Score, TokenChoice};
use wgmoe::{Context, Gpu, wgpu};

const D: u32 = 32;
/// The last word of a coreset has bits of experts that are not there.
const E: u32 = 40;
const K: u32 = 4;
const WORDS: usize = E.div_ceil(32) as usize;

fn routing(rule: BlockRule) -> Routing {
    let choice = TokenChoice::new(K).with_score(Score::Sigmoid).with_scale(2.5);
    Routing::TokenChoice(choice.with_coreset(rule))
}

/// A routing bound to buffers whose content changes from step to step.
struct Steps<'a> {
    gpu: &'a Gpu,
    host: HostLayer,
    bound: BoundLayer,
    hidden: wgpu::Buffer,
    coresets: Output,
    refresh: wgpu::Buffer,
    offsets: Vec<u32>,
}

impl<'a> Steps<'a> {
    fn new(gpu: &'a Gpu, ctx: &Context, rule: BlockRule, offsets: &[u32], given: &[u32]) -> Self {
        let host = HostLayer::new(LayerConfig::new(D, 16, E, routing(rule))).with_bias();
        let op = MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap();
        let (tokens, count) = (offsets[offsets.len() - 1], offsets.len() as u32 - 1);
        let hidden = gpu.upload(&vec![0f32; (tokens * D) as usize]);
        let coresets = Output::holding(gpu, given);
        let refresh = gpu.upload(&vec![1u32; count as usize]);
        let at = gpu.upload(offsets);
        let blocks = Blocks::new(count, &at).with_kept(coresets.slice(), &refresh);
        let bound = op.bind(&Batch::new(&hidden, tokens).with_blocks(blocks)).unwrap();
        Self { gpu, host, bound, hidden, coresets, refresh, offsets: offsets.to_vec() }
    }

    /// A step on hidden states of a seed, against the twin; the coresets after it.
    fn run(&self, seed: u64, refresh: &[u32], what: &str) -> Vec<u32> {
        let Self { gpu, bound, offsets, .. } = self;
        let tokens = offsets[offsets.len() - 1] as usize;
        let x = random(seed, tokens * D as usize);
        gpu.queue.write_buffer(&self.hidden, 0, bytemuck::cast_slice(&x));
        gpu.queue.write_buffer(&self.refresh, 0, bytemuck::cast_slice(refresh));
        let before: Vec<u32> = self.coresets.get(gpu);
        gpu.run_layer(bound).unwrap();
        let [logits, s, r] = selection(bound)
            .unwrap()
            .map(|slice| gpu.download::<f32>(slice).unwrap()[..tokens * E as usize].to_vec());
        let blocks = HostBlocks { offsets, voters: None, kept: Some([&before, refresh]) };
        let batch = HostBatch { blocks: Some(blocks), ..HostBatch::default() };
        let want = self.host.routing(batch, [&logits, &s, &r]);
        let after: Vec<u32> = self.coresets.get(gpu);
        assert_same(&after, want.coreset.as_ref().unwrap(), &format!("{what}: coresets"));
        let words = E as usize * bits::columns(tokens);
        let assigned: Vec<u32> = gpu.download(bound.assigned().unwrap()).unwrap();
        assert_same(&assigned[..words], &want.assigned, what);

        // Whatever the twin says: as many as there are, up to K, and none from outside.
        for (b, range) in offsets.windows(2).enumerate() {
            let own = &after[b * WORDS..][..WORDS];
            let members: Vec<usize> =
                (0..E as usize).filter(|e| own[e / 32] >> (e % 32) & 1 == 1).collect();
            for t in range[0] as usize..range[1] as usize {
                let chosen = bits::experts_of(&assigned[..words], tokens, t);
                assert_eq!(chosen.len(), members.len().min(K as usize), "{what}: token {t}");
                assert!(chosen.iter().all(|e| members.contains(e)), "{what}: token {t}");
            }
            if refresh[b] == 0 {
                assert_eq!(own, &before[b * WORDS..][..WORDS], "{what}: block {b} keeps");
            }
        }
        after
    }

    /// The same routing without coresets of the caller's.
    fn elected(&self, ctx: &Context, seed: u64) -> Vec<u32> {
        let (gpu, tokens) = (self.gpu, self.offsets[self.offsets.len() - 1]);
        let op = MoeRouting::new(ctx, self.host.config, self.host.router(ctx).unwrap()).unwrap();
        let hidden = gpu.upload(&random(seed, (tokens * D) as usize));
        let at = gpu.upload(&self.offsets);
        let blocks = Blocks::new(self.offsets.len() as u32 - 1, &at);
        let bound = op.bind(&Batch::new(&hidden, tokens).with_blocks(blocks)).unwrap();
        gpu.run_layer(&bound).unwrap();
        let all: Vec<u32> = gpu.download(bound.coreset().unwrap()).unwrap();
        all[..(self.offsets.len() - 1) * WORDS].to_vec()
    }
}

#[test]
fn blocks_keep_elect_and_take_what_they_are_given() {
    let Some(gpu) = gpu() else { return };
    // One column, so at once; and by three kernels.
    for offsets in [&[0, 10, 21, 32][..], &[0, 32, 50, 70]] {
        for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
            for rule in every_block_rule(E, K) {
                let what = format!("{} {rule:?} {offsets:?}", variant_name(&ctx));
                // Of the first block none, of the second a few, of the third all and more.
                let mut given = vec![0; 3 * WORDS];
                given[WORDS..][..WORDS].copy_from_slice(&[0x8000_0401, 0x0000_0012]);
                given[2 * WORDS..].fill(u32::MAX);
                let steps = Steps::new(&gpu, &ctx, rule, offsets, &given);
                let at = |step| format!("{what}: {step}");
                assert_eq!(steps.run(3, &[0, 0, 0], &at("given")), given);
                steps.run(4, &[1, 0, 0], &at("one elects"));
                let all = steps.run(5, &[1, 7, u32::MAX], &at("all elect"));
                assert_same(&all, &steps.elected(&ctx, 5), &at("as without"));
                assert_eq!(steps.run(6, &[0, 0, 0], &at("kept")), all);
                steps.run(7, &[0, 1, 0], &at("the one between elects"));
            }
        }
    }
}

/// A layer inside coresets that it elected, and one inside the same coresets, given: the same bits.
#[test]
fn kept_is_given() {
    let Some(gpu) = gpu() else { return };
    for offsets in [&[0, 10, 21, 32][..], &[0, 32, 50, 70]] {
        for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
            for rule in every_block_rule(E, K) {
                let config = LayerConfig::new(D, 16, E, routing(rule)).with_shared_experts(1);
                let host = HostLayer::new(config).with_bias();
                let layer = host.layer(&ctx, &gpu.queue).unwrap();
                let (tokens, count) = (offsets[offsets.len() - 1], offsets.len() as u32 - 1);
                let at = gpu.upload(offsets);
                let hidden = gpu.upload(&random(8, (tokens * D) as usize));
                let run = |coresets: &Output, refresh: u32| {
                    let refresh = gpu.upload(&vec![refresh; count as usize]);
                    let blocks = Blocks::new(count, &at).with_kept(coresets.slice(), &refresh);
                    let out = Output::f32s(&gpu, (tokens * D) as usize);
                    let batch = Batch::new(&hidden, tokens).with_blocks(blocks);
                    let bound = layer.bind(&batch.into_out(out.slice())).unwrap();
                    gpu.run_layer(&bound).unwrap();
                    exact(&out.get::<f32>(&gpu))
                };
                let poison = vec![0xa5a5_a5a5_u32; count as usize * WORDS];
                let elected = Output::holding(&gpu, &poison);
                let want = run(&elected, 1);
                let what = format!("{} {rule:?} {offsets:?}", variant_name(&ctx));
                assert_same(&run(&elected, 0), &want, &format!("{what}: kept"));
                let given = Output::holding(&gpu, &elected.get::<u32>(&gpu));
                assert_same(&run(&given, 0), &want, &format!("{what}: given"));
                let other = Output::holding(&gpu, &poison);
                assert!(run(&other, 0) != want, "{what}: another coreset is heard");
            }
        }
    }
}

#[test]
fn what_does_not_fit() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    for tokens in [20, 70] {
        let host = HostLayer::new(LayerConfig::new(D, 16, E, routing(BlockRule::vote(8))));
        let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
        let hidden = gpu.upload(&vec![0f32; (tokens * D) as usize]);
        let [at, one] = [vec![0, 9, tokens], vec![1u32]].map(|v| gpu.upload(&v));
        let [few, fits] = [3, 4].map(|n| gpu.upload(&vec![0u32; n]));
        let [two, four] = [2, 4].map(|n| gpu.upload(&vec![0u32; n]));
        let message = |coresets, refresh| {
            let blocks = Blocks::new(2, &at).with_kept(coresets, refresh);
            let batch = Batch::new(&hidden, tokens).with_blocks(blocks);
            op.bind(&batch).unwrap_err().to_string()
        };
        assert_eq!(message(&few, &two), "`coresets`: expected 16 bytes, [2, 2] u32, got 12");
        assert_eq!(message(&fits, &one), "`refresh`: expected 8 bytes, [2] u32, got 4");
        assert_eq!(message(&fits, &four), "`refresh`: expected 8 bytes, [2] u32, got 16");
        assert_eq!(message(&fits, &fits), "`coresets` is written and overlaps `refresh`");
    }
}
