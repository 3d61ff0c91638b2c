//! Experts of many blocks of synthetic logits, under every rule.
use crate::rules::Rule;
use crate::{Options, Row};
use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::compare::Checks;
use testkit::layer::host_router;
use testkit::program::Progress;
use testkit::synthetic::mixture;
use wgmoe::layer::{HostBatch, HostBlocks, HostSequences, LayerConfig, cpu_routing};
use wgmoe::ops::expert_union::{self, ExpertUnion, Totals};
use wgmoe::ops::{coreset, scores, sequence_top, token_choice};
use wgmoe::plan::bits;
use wgmoe::routing::{Routing, Score};
use wgmoe::{BoundOp, Context, Error, Gpu, WeightType, wgpu};

/// Checks of one row; what failed is said on stderr.
pub(super) fn checks<'a>(rule: &Rule, progress: &'a Progress) -> Checks<'a> {
    Checks::new(format!("{}, blocks of {}", rule.name, rule.block), progress)
}

/// Synthetic router logits of some blocks.
pub(super) struct Draw {
    pub(super) experts: u32,
    pub(super) tokens: u32,
    pub(super) offsets: Vec<u32>,
    /// Half of the tokens, by chance.
    pub(super) voters: Vec<u32>,
    pub(super) logits: Vec<f32>,
}

impl Draw {
    pub(super) fn new(seed: u64, experts: u32, block: u32, blocks: u32) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(block.into()));
        let tokens = block * blocks;
        let mut logits = mixture(&mut rng, tokens, block, experts);
        logits.iter_mut().for_each(|g| *g = 2.0 * *g - 3.0);
        Self {
            experts,
            tokens,
            offsets: (0..=blocks).map(|b| b * block).collect(),
            voters: (0..tokens).map(|_| rng.random_range(0..2)).collect(),
            logits,
        }
    }

    pub(super) fn blocks(&self) -> u32 {
        self.offsets.len() as u32 - 1
    }
}

/// What routing made of the blocks of a draw, by either side.
#[derive(Debug, PartialEq)]
pub(super) struct Routed {
    /// `[blocks, ceil(E / 32)]`.
    pub(super) coreset: Option<Vec<u32>>,
    /// `[E, ceil(T / 32)]`.
    pub(super) assigned: Vec<u32>,
    /// Experts used, `[blocks, ceil(E / 32)]`.
    pub(super) members: Vec<u32>,
    pub(super) counts: Vec<u32>,
    pub(super) bytes: Vec<u64>,
    pub(super) totals: Totals,
}

impl Routed {
    /// The CPU twin, from these scores.
    pub(super) fn twin(
        config: &LayerConfig,
        rule: &Rule,
        draw: &Draw,
        s: &[f32],
        r: &[f32],
    ) -> Self {
        let config = config.with_routing(rule.routing);
        let router = host_router(&[], None);
        let offsets = &draw.offsets;
        let batch = HostBatch {
            sequences: Some(HostSequences { offsets, lengths: None, capacity: None }),
            blocks: Some(HostBlocks {
                kept: None,
                offsets,
                voters: rule.marked.then_some(&draw.voters),
            }),
            ..HostBatch::default()
        };
        let routed = cpu_routing(&config, &router, batch, [&draw.logits, s, r]);
        let (tokens, e) = (draw.tokens as usize, draw.experts as usize);
        let (members, counts, bytes) =
            expert_union::cpu(&routed.assigned, tokens, e, offsets, expert_bytes(&config));
        let mut totals = Totals::default();
        totals.add(&counts, offsets, tokens);
        let (coreset, assigned) = (routed.coreset, routed.assigned);
        Self { coreset, assigned, members, counts, bytes, totals }
    }

    pub(super) fn row(&self, rule: &Rule, draw: &Draw, ok: bool) -> Row {
        let blocks = f64::from(draw.blocks());
        let mean =
            |words: &[u32]| words.iter().map(|w| f64::from(w.count_ones())).sum::<f64>() / blocks;
        let coreset = self.coreset.as_deref().map_or(draw.experts.into(), mean);
        Row {
            rule: rule.name,
            block: rule.block,
            published: rule.published,
            kept: rule.kept,
            measured: self.totals.mean(),
            coreset,
            bytes: self.bytes.iter().map(|&b| b as f64).sum::<f64>() / blocks,
            layer_ms: None,
            ok,
            times: None,
        }
    }
}

/// Bytes of one expert in bf16.
pub(super) fn expert_bytes(config: &LayerConfig) -> u64 {
    config.expert_shape(WeightType::Bf16).expert_bytes()
}

/// A draw on the device, scored.
pub(super) struct Scored<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) ctx: &'a Context,
    pub(super) draw: &'a Draw,
    pub(super) offsets: wgpu::Buffer,
    pub(super) voters: wgpu::Buffer,
    pub(super) s: wgpu::Buffer,
    pub(super) r: wgpu::Buffer,
}

/// A rule's choice, bound.
pub(super) struct Chosen {
    pub(super) step: BoundOp,
    pub(super) coreset: Option<wgpu::Buffer>,
    pub(super) assigned: wgpu::Buffer,
}

impl<'a> Scored<'a> {
    pub(super) fn new(gpu: &'a Gpu, ctx: &'a Context, draw: &'a Draw) -> Result<Self, Error> {
        let [logits, s, r] = [
            gpu.upload(&draw.logits),
            gpu.upload(&vec![f32::NAN; draw.logits.len()]),
            gpu.upload(&vec![f32::NAN; draw.logits.len()]),
        ];
        let args = scores::Args {
            logits: (&logits).into(),
            bias: None,
            scores: (&s).into(),
            values: (&r).into(),
        };
        let dims = scores::Dims {
            tokens: draw.tokens,
            experts: draw.experts,
            score: Score::Sigmoid,
            by_logits: false,
        };
        let step = scores::Scores::new(ctx)?.bind(&dims, args)?;
        gpu.run(&step)?;
        let (offsets, voters) = (gpu.upload(&draw.offsets), gpu.upload(&draw.voters));
        Ok(Self { gpu, ctx, draw, offsets, voters, s, r })
    }

    pub(super) fn poisoned(&self, words: usize) -> wgpu::Buffer {
        self.gpu.upload(&vec![u32::MAX; words])
    }

    /// From scores to the experts of each token.
    pub(super) fn choose(&self, rule: &Rule) -> Result<Chosen, Error> {
        let Draw { tokens, experts, .. } = *self.draw;
        let (ctx, blocks) = (self.ctx, self.draw.blocks());
        let assigned = self.poisoned(experts as usize * bits::columns(tokens as usize));
        let choice = |top, groups| token_choice::TokenChoice::new(ctx, experts, top, groups);
        match rule.routing {
            Routing::SequenceTop(pairs) => {
                let dims = sequence_top::Dims {
                    tokens,
                    experts,
                    sequences: blocks,
                    experts_per_token: pairs.experts_per_token,
                };
                let args = sequence_top::Args {
                    values: (&self.r).into(),
                    offsets: (&self.offsets).into(),
                    assigned: (&assigned).into(),
                };
                let step = sequence_top::SequenceTop::new(ctx)?.bind(&dims, args)?;
                Ok(Chosen { step, coreset: None, assigned })
            }
            Routing::TokenChoice(inside) => {
                let mut step = BoundOp::default();
                let mut elected = None;
                if let Some(block) = inside.coreset {
                    // Read before the final choice is written to the same place.
                    let own = block.own_top(inside.experts_per_token);
                    if let Some(top) = own {
                        let args = token_choice::Args {
                            experts_per_token: None,
                            values: (&self.r).into(),
                            coresets: None,
                            assigned: (&assigned).into(),
                        };
                        step = step
                            .then(choice(top, None)?.bind(&token_choice::Dims { tokens }, args)?);
                    }
                    let members = self.poisoned(blocks as usize * experts.div_ceil(32) as usize);
                    let block_of = self.poisoned(tokens as usize);
                    let args = coreset::Args {
                        refresh: None,
                        values: (&self.r).into(),
                        own_choice: own.map(|_| (&assigned).into()),
                        offsets: (&self.offsets).into(),
                        voters: rule.marked.then(|| (&self.voters).into()),
                        members: (&members).into(),
                        block_of: (&block_of).into(),
                    };
                    let dims = coreset::Dims { tokens, blocks };
                    step =
                        step.then(coreset::Coreset::new(ctx, experts, block)?.bind(&dims, args)?);
                    elected = Some((members, block_of));
                }
                let coresets = elected.as_ref().map(|(members, block_of)| token_choice::Coresets {
                    blocks,
                    coreset: members.into(),
                    block_of: block_of.into(),
                });
                let args = token_choice::Args {
                    experts_per_token: None,
                    values: (&self.r).into(),
                    coresets,
                    assigned: (&assigned).into(),
                };
                step = step.then(
                    choice(inside.experts_per_token, inside.groups)?
                        .bind(&token_choice::Dims { tokens }, args)?,
                );
                Ok(Chosen { step, coreset: elected.map(|(members, _)| members), assigned })
            }
            other => Err(Error::Invalid { name: "rule", reason: format!("{other:?}") }),
        }
    }
}

impl Scored<'_> {
    /// Routes by a rule on the device and checks it against the twin, which is fed the device's own
    /// scores.
    pub(super) fn run(
        &self,
        rule: &Rule,
        checks: &mut Checks<'_>,
        config: &LayerConfig,
        [s, r]: [&[f32]; 2],
    ) -> Result<Routed, Error> {
        let (gpu, draw) = (self.gpu, self.draw);
        let Draw { tokens, experts, .. } = *draw;
        let blocks = draw.blocks();
        let chosen = self.choose(rule)?;
        let members = self.poisoned(blocks as usize * experts.div_ceil(32) as usize);
        let counts = self.poisoned(blocks as usize);
        let bytes = self.poisoned(2 * blocks as usize);
        let totals = gpu.upload(&[0u32; 4]);
        let dims =
            expert_union::Dims { tokens, experts, blocks, expert_bytes: expert_bytes(config) };
        let args = expert_union::Args {
            assigned: (&chosen.assigned).into(),
            offsets: (&self.offsets).into(),
            members: (&members).into(),
            counts: (&counts).into(),
            bytes: (&bytes).into(),
            totals: Some((&totals).into()),
        };
        let union = ExpertUnion::new(self.ctx)?.bind(&dims, args)?;
        gpu.run(&chosen.step.then(union))?;
        let got = Routed {
            coreset: chosen.coreset.map(|c| gpu.download(&c)).transpose()?,
            assigned: gpu.download(&chosen.assigned)?,
            members: gpu.download(&members)?,
            counts: gpu.download(&counts)?,
            bytes: gpu.download(&bytes)?,
            totals: Totals::from_words(&gpu.download::<u32>(&totals)?)?,
        };
        let want = Routed::twin(config, rule, draw, s, r);
        let [coreset, want_coreset] =
            [&got.coreset, &want.coreset].map(|c| c.as_deref().unwrap_or_default());
        checks.same("coreset", coreset, want_coreset);
        checks.same("assigned", &got.assigned, &want.assigned);
        checks.same("experts used", &got.members, &want.members);
        checks.same("how many", &got.counts, &want.counts);
        checks.same("their bytes", &got.bytes, &want.bytes);
        checks.same("running mean", &[got.totals], &[want.totals]);
        Ok(got)
    }
}

/// Every rule on the device, with the blocks of one draw for each block size.
pub(super) fn count_on_gpu(
    options: &Options,
    config: &LayerConfig,
    gpu: &Gpu,
    ctx: &Context,
    rules: &[Rule],
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    let mut rows = vec![];
    for of_size in rules.chunk_by(|a, b| a.block == b.block) {
        let block = of_size[0].block;
        progress.say(format!("{} blocks of {block}: drawing and scoring", options.blocks));
        let draw = Draw::new(options.seed, config.experts, block, options.blocks);
        let scored = Scored::new(gpu, ctx, &draw)?;
        let [s, r]: [Vec<f32>; 2] = [gpu.download(&scored.s)?, gpu.download(&scored.r)?];
        let (want, _) =
            scores::cpu(&draw.logits, config.experts as usize, Score::Sigmoid, false, None);
        for rule in of_size {
            progress.say(format!("{} blocks of {block}: {}", options.blocks, rule.name));
            let mut checks = checks(rule, progress);
            checks.close("scores", &s, &want, 1e-7, 1e-5);
            checks.same("selection", &r, &s);
            let routed = scored.run(rule, &mut checks, config, [&s, &r])?;
            rows.push(routed.row(rule, &draw, checks.ok));
        }
    }
    Ok(rows)
}

/// Every rule on the CPU twins alone; what must hold of any choice is checked.
pub(super) fn count_on_cpu(
    options: &Options,
    config: &LayerConfig,
    rules: &[Rule],
    progress: &Progress,
) -> Vec<Row> {
    let mut rows = vec![];
    for of_size in rules.chunk_by(|a, b| a.block == b.block) {
        let draw = Draw::new(options.seed, config.experts, of_size[0].block, options.blocks);
        let (s, r) =
            scores::cpu(&draw.logits, config.experts as usize, Score::Sigmoid, false, None);
        for rule in of_size {
            progress.say(format!("{} blocks of {}: {}", options.blocks, rule.block, rule.name));
            let routed = Routed::twin(config, rule, &draw, &s, &r);
            let mut checks = checks(rule, progress);
            if let Some(coreset) = &routed.coreset {
                let outside = |(used, elected): (&u32, &u32)| used & !elected;
                let outside: Vec<u32> = routed.members.iter().zip(coreset).map(outside).collect();
                checks.same("experts outside the coreset", &outside, &vec![0; coreset.len()]);
            }
            rows.push(routed.row(rule, &draw, checks.ok));
        }
    }
    rows
}
