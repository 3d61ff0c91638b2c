//! How many experts a block of tokens uses together under each block-level rule: published beside measured.
//!
//! Draws synthetic router logits, `g = 2 (sqrt(0.6) Z_block[e] + sqrt(0.4) Z[t, e]) - 3` with Z standard normal, routes
//! many blocks of them by every rule on the GPU, checks every choice against the CPU twins exactly, and prints the experts
//! of a block and the bytes of their weights. Then runs one block of 32 tokens through a layer of LLaDA2.0-mini's shape under
//! each rule and prints the time: `cargo run --release -p studies --bin block_union -- --help`. Where there is no GPU driver, the
//! CPU twins count alone. Exits with 1 where a check fails.
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use svg::node::element::{Group, Rectangle, Style, Text};
use testkit::compare::{Checks, largest};
use testkit::layer::{host_router, outputs, router, upload};
use testkit::program::{self, Found, Progress};
use testkit::statistics::median;
use testkit::synthetic::{self, Pool, RHO, mixture, shrink};
use wgmoe::layer::{
    Batch, Blocks, BoundLayer, HostBatch, HostBlocks, HostSequences, LayerConfig, MoeLayer,
    cpu_routing,
};
use wgmoe::models;
use wgmoe::ops::expert_union::{self, ExpertUnion, Totals};
use wgmoe::ops::{coreset, scores, sequence_top, token_choice};
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, Routing, Score, SequenceTop, TokenChoice};
use wgmoe::{BoundOp, Context, Dispatch, Error, Gpu, WeightType, wgpu};

/// Experts that a block of tokens uses under each block-level rule, and what that costs: published beside measured.
#[derive(Parser)]
struct Options {
    /// Blocks drawn for each row
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=2048))]
    blocks: u32,
    /// Routed experts of the layer that is timed, at most 256; with fewer, counts of experts in rules shrink alike
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    experts: u32,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Seed of logits, weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Also draw the experts of a block, published and measured
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    rules: Vec<Row>,
    /// What the tables say besides.
    #[serde(skip)]
    head: Vec<String>,
    /// What the table of times says of the layer.
    #[serde(skip)]
    layer: Option<String>,
}

#[derive(Serialize)]
struct Row {
    rule: &'static str,
    /// Tokens of a block.
    block: u32,
    published: Option<f64>,
    /// Mean over the blocks of what was published: experts that a block's tokens use, or for dMoE those it elects.
    measured: f64,
    /// Mean of the experts a block elects; all where its rule elects none.
    coreset: f64,
    /// Mean of the bytes of the weights of the experts that a block's tokens use.
    bytes: f64,
    layer_ms: Option<f64>,
    ok: bool,
    /// Mean of the experts that a block's tokens use.
    #[serde(skip)]
    used: f64,
    #[serde(skip)]
    times: Option<Times>,
}

/// One block through the layer; milliseconds.
struct Times {
    /// Experts that this block used.
    used: u32,
    /// From the logits to the plan, both apart.
    routing: f64,
    /// The experts and the sum of their outputs.
    ffn: f64,
    layer: f64,
}

/// Tokens that LLaDA2.x decodes together.
const BLOCK: u32 = 32;

/// A rule, and what was published of it.
#[derive(Clone, Copy)]
struct Rule {
    name: &'static str,
    routing: Routing,
    block: u32,
    published: Option<f64>,
    /// Only tokens that are marked have a say: half of them, here.
    marked: bool,
}

impl Rule {
    fn coreset(&self) -> Option<BlockRule> {
        match self.routing {
            Routing::TokenChoice(rule) => rule.coreset,
            _ => None,
        }
    }
}

/// The layer whose experts are counted.
fn mini() -> Result<LayerConfig, String> {
    Ok(models::find("llada2-mini").ok_or("no llada2-mini")?.settings)
}

/// Every row, in the order printed. Rules elect their coresets without regard to groups; LLaDA2.0's tokens then choose
/// within its groups, 4 of 8.
fn rules() -> Result<Vec<Rule>, String> {
    let trained = models::find("llada2.2-mini").ok_or("no llada2.2-mini")?.settings.routing;
    let Routing::TokenChoice(own) = mini()?.routing else {
        return Err("llada2-mini does not route by token choice".into());
    };
    let rule = |name, block, published, routing| Rule {
        name,
        routing,
        block,
        published: Some(published),
        marked: false,
    };
    let choose = |name, block, published, coreset| {
        rule(name, block, published, Routing::TokenChoice(TokenChoice { coreset, ..own }))
    };
    let elect = |name, published, elected| choose(name, BLOCK, published, Some(elected));
    // The paper's code has a floor of 16, above what the paper reports of p 0.4 to 0.6.
    let mass = |p| BlockRule::Mass { p, floor: 8 };
    let top_4 = Routing::TokenChoice(TokenChoice { top: 4, ..own });
    let pairs = Routing::SequenceTop(SequenceTop {
        score: own.score,
        gate: own.gate,
        top: own.top,
        scale: own.scale,
    });
    let unpublished = |rule| Rule { published: None, ..rule };
    Ok(vec![
        choose("original", BLOCK, 69.5, None),
        rule("top-4", BLOCK, 43.5, top_4),
        elect("DES-S, k' 3", 41.1, BlockRule::Union(3)),
        elect("DES-V, M 38", 36.9, BlockRule::Vote(38)),
        elect("dMoE, p 0.4", 10.4, mass(0.4)),
        elect("dMoE, p 0.5", 11.7, mass(0.5)),
        elect("dMoE, p 0.6", 14.6, mass(0.6)),
        elect("dMoE, p 0.7", 19.7, mass(0.7)),
        elect("dMoE, p 0.8", 27.8, mass(0.8)),
        rule("LLaDA2.2, C 48", BLOCK, 45.2, trained),
        unpublished(elect("DES-S, k' 2", 0.0, BlockRule::Union(2))),
        Rule { marked: true, ..unpublished(elect("TEAM, k' 3", 0.0, BlockRule::Union(3))) },
        unpublished(rule("SeqTopK", BLOCK, 0.0, pairs)),
        choose("original", 8, 31.8, None),
        choose("dMoE, p 0.6", 8, 14.6, Some(mass(0.6))),
        choose("original", 16, 48.8, None),
        choose("dMoE, p 0.6", 16, 16.3, Some(mass(0.6))),
        choose("original", 24, 60.6, None),
        choose("dMoE, p 0.6", 24, 15.9, Some(mass(0.6))),
    ])
}

/// Checks of one row; what failed is said on stderr.
fn checks<'a>(rule: &Rule, progress: &'a Progress) -> Checks<'a> {
    Checks::new(format!("{}, blocks of {}", rule.name, rule.block), progress)
}

/// Synthetic router logits of some blocks.
struct Draw {
    experts: u32,
    tokens: u32,
    offsets: Vec<u32>,
    /// Half of the tokens, by chance.
    voters: Vec<u32>,
    logits: Vec<f32>,
}

impl Draw {
    fn new(seed: u64, experts: u32, block: u32, blocks: u32) -> Self {
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

    fn blocks(&self) -> u32 {
        self.offsets.len() as u32 - 1
    }
}

/// What routing made of the blocks of a draw, by either side.
#[derive(Debug, PartialEq)]
struct Routed {
    /// `[blocks, ceil(E / 32)]`.
    coreset: Option<Vec<u32>>,
    /// `[E, ceil(T / 32)]`.
    assigned: Vec<u32>,
    /// Experts used, `[blocks, ceil(E / 32)]`.
    members: Vec<u32>,
    counts: Vec<u32>,
    bytes: Vec<u64>,
    totals: Totals,
}

impl Routed {
    /// The CPU twin, from these scores.
    fn twin(settings: &LayerConfig, rule: &Rule, draw: &Draw, s: &[f32], r: &[f32]) -> Self {
        let settings = settings.with_routing(rule.routing);
        let router = host_router(&[], None);
        let offsets = &draw.offsets;
        let batch = HostBatch {
            sequences: Some(HostSequences { offsets, lengths: None, capacity: &[] }),
            blocks: Some(HostBlocks { offsets, voters: rule.marked.then_some(&draw.voters) }),
        };
        let routed = cpu_routing(&settings, &router, batch, [&draw.logits, s, r]);
        let (tokens, e) = (draw.tokens as usize, draw.experts as usize);
        let (members, counts, bytes) =
            expert_union::cpu(&routed.assigned, tokens, e, offsets, expert_bytes(&settings));
        let mut totals = Totals::default();
        totals.add(&counts, offsets, tokens);
        let (coreset, assigned) = (routed.coreset, routed.assigned);
        Self { coreset, assigned, members, counts, bytes, totals }
    }

    fn row(&self, rule: &Rule, draw: &Draw, ok: bool) -> Row {
        let blocks = f64::from(draw.blocks());
        let mean =
            |words: &[u32]| words.iter().map(|w| f64::from(w.count_ones())).sum::<f64>() / blocks;
        let coreset = self.coreset.as_deref().map_or(draw.experts.into(), mean);
        let used = self.totals.mean();
        let by_coreset = matches!(rule.coreset(), Some(BlockRule::Mass { .. }));
        Row {
            rule: rule.name,
            block: rule.block,
            published: rule.published,
            measured: if by_coreset { coreset } else { used },
            coreset,
            bytes: self.bytes.iter().map(|&b| b as f64).sum::<f64>() / blocks,
            layer_ms: None,
            ok,
            used,
            times: None,
        }
    }
}

/// Bytes of one expert in bf16.
fn expert_bytes(settings: &LayerConfig) -> u64 {
    settings.expert_shape(WeightType::Bf16).expert_bytes()
}

/// A draw on the device, scored.
struct Scored<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    draw: &'a Draw,
    offsets: wgpu::Buffer,
    voters: wgpu::Buffer,
    s: wgpu::Buffer,
    r: wgpu::Buffer,
}

/// A rule's choice, bound.
struct Chosen {
    step: BoundOp,
    coreset: Option<wgpu::Buffer>,
    assigned: wgpu::Buffer,
}

impl<'a> Scored<'a> {
    fn new(gpu: &'a Gpu, ctx: &'a Context, draw: &'a Draw) -> Result<Self, Error> {
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

    fn poisoned(&self, words: usize) -> wgpu::Buffer {
        self.gpu.upload(&vec![u32::MAX; words])
    }

    /// From scores to the experts of each token.
    fn choose(&self, rule: &Rule) -> Result<Chosen, Error> {
        let Draw { tokens, experts, .. } = *self.draw;
        let (ctx, blocks) = (self.ctx, self.draw.blocks());
        let assigned = self.poisoned(experts as usize * bits::columns(tokens as usize));
        let choice = |top, groups| token_choice::TokenChoice::new(ctx, experts, top, groups);
        match rule.routing {
            Routing::SequenceTop(pairs) => {
                let dims =
                    sequence_top::Dims { tokens, experts, sequences: blocks, top: pairs.top };
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
                    let own = block.own_top(inside.top);
                    if let Some(top) = own {
                        let args = token_choice::Args {
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
                    values: (&self.r).into(),
                    coresets,
                    assigned: (&assigned).into(),
                };
                step = step.then(
                    choice(inside.top, inside.groups)?
                        .bind(&token_choice::Dims { tokens }, args)?,
                );
                Ok(Chosen { step, coreset: elected.map(|(members, _)| members), assigned })
            }
            other => Err(Error::Invalid { name: "rule", reason: format!("{other:?}") }),
        }
    }
}

impl Scored<'_> {
    /// Routes by a rule on the device and checks it against the twin, which is fed the device's own scores.
    fn run(
        &self,
        rule: &Rule,
        checks: &mut Checks<'_>,
        settings: &LayerConfig,
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
            expert_union::Dims { tokens, experts, blocks, expert_bytes: expert_bytes(settings) };
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
        let want = Routed::twin(settings, rule, draw, s, r);
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
fn count_on_gpu(
    options: &Options,
    settings: &LayerConfig,
    gpu: &Gpu,
    ctx: &Context,
    rules: &[Rule],
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    let mut rows = vec![];
    for of_size in rules.chunk_by(|a, b| a.block == b.block) {
        let block = of_size[0].block;
        progress.say(format!("{} blocks of {block}: drawing and scoring", options.blocks));
        let draw = Draw::new(options.seed, settings.experts, block, options.blocks);
        let scored = Scored::new(gpu, ctx, &draw)?;
        let [s, r]: [Vec<f32>; 2] = [gpu.download(&scored.s)?, gpu.download(&scored.r)?];
        let (want, _) =
            scores::cpu(&draw.logits, settings.experts as usize, Score::Sigmoid, false, None);
        for rule in of_size {
            progress.say(format!("{} blocks of {block}: {}", options.blocks, rule.name));
            let mut checks = checks(rule, progress);
            checks.close("scores", &s, &want, 1e-7, 1e-5);
            checks.same("selection", &r, &s);
            let routed = scored.run(rule, &mut checks, settings, [&s, &r])?;
            rows.push(routed.row(rule, &draw, checks.ok));
        }
    }
    Ok(rows)
}

/// Every rule on the CPU twins alone; what must hold of any choice is checked.
fn count_on_cpu(
    options: &Options,
    settings: &LayerConfig,
    rules: &[Rule],
    progress: &Progress,
) -> Vec<Row> {
    let mut rows = vec![];
    for of_size in rules.chunk_by(|a, b| a.block == b.block) {
        let draw = Draw::new(options.seed, settings.experts, of_size[0].block, options.blocks);
        let (s, r) =
            scores::cpu(&draw.logits, settings.experts as usize, Score::Sigmoid, false, None);
        for rule in of_size {
            progress.say(format!("{} blocks of {}: {}", options.blocks, rule.block, rule.name));
            let routed = Routed::twin(settings, rule, &draw, &s, &r);
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

/// A layer of the model's shape with synthetic weights, and hidden states of one block, whose logits are spread as those
/// above: the router's weights are normal with deviation 2 / sqrt(D), and read the -3 from the first hidden value, 1.
///
/// Each expert's matrix is a window of one pool of random numbers, at a place of its own, so that the layer takes little
/// memory on the host. Deviations of 1 / sqrt(D) and 1 / sqrt(F) keep activations near 1.
struct Data {
    settings: LayerConfig,
    x: Vec<f32>,
    router: Vec<f32>,
    voters: Vec<u32>,
    experts: Pool,
}

impl Data {
    fn new(settings: LayerConfig, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let x = synthetic::hidden_states(&mut rng, BLOCK, BLOCK, settings.hidden);
        let router = synthetic::router(&mut rng, &settings);
        let voters = (0..BLOCK).map(|t| t % 2).collect();
        let experts = Pool::new(&mut rng, &settings, WeightType::Bf16);
        Self { settings, x, router, voters, experts }
    }

    fn upload(&self, gpu: &Gpu, ctx: &Context) -> Result<MoeLayer, Error> {
        let shape = self.settings.expert_shape(WeightType::Bf16);
        let weights = upload(gpu, ctx, shape, &|e, p| self.experts.matrix(e, p))?;
        MoeLayer::new(ctx, self.settings, router(ctx, &self.router, None)?, weights)
    }
}

/// Milliseconds of recording, submitting and awaiting this work.
fn wall<'a>(gpu: &Gpu, dispatches: impl IntoIterator<Item = &'a Dispatch>) -> Result<f64, Error> {
    let start = Instant::now();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for dispatch in dispatches {
            dispatch.record(&mut pass);
        }
    }
    gpu.queue.submit([encoder.finish()]);
    gpu.wait()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// How far an output may be off, as a share of its token's largest value.
const OUTPUT: f32 = 1e-4;

/// One block through the layer under a rule, checked: the choice exactly, the output of two tokens within [`OUTPUT`].
/// Returns what to time, and how many experts the block used.
fn check_layer(
    gpu: &Gpu,
    layer: &MoeLayer,
    data: &Data,
    rule: &Rule,
    checks: &mut Checks<'_>,
) -> Result<(BoundLayer, u32), Error> {
    let [hidden, out] = [gpu.upload(&data.x), gpu.upload(&vec![f32::NAN; data.x.len()])];
    let offsets = [0, BLOCK];
    let [ends, voters] = [gpu.upload(&offsets), gpu.upload(&data.voters)];
    let mut batch = Batch::new(&hidden, BLOCK).into_out(&out);
    let marked = rule.marked.then(|| (&voters).into());
    batch.blocks = Some({
        let mut blocks = Blocks::new(1, &ends);
        blocks.voters = marked;
        blocks
    });
    let step = layer.bind(&batch)?;
    wall(gpu, step.dispatches())?;
    let got: Vec<f32> = gpu.download(&out)?;

    let settings = layer.config();
    let (tokens, e, d) = (BLOCK as usize, settings.experts as usize, settings.hidden as usize);
    let none = || Error::Device("an empty step".into());
    let [logits, s, r] = testkit::layer::selection(&step).ok_or_else(none)?;
    let [logits, s, r]: [Vec<f32>; 3] = [gpu.download(logits)?, gpu.download(s)?, gpu.download(r)?];
    let router = host_router(&data.router, None);
    let voters = rule.marked.then_some(&data.voters[..]);
    let batch =
        HostBatch { sequences: None, blocks: Some(HostBlocks { offsets: &offsets, voters }) };
    let want = cpu_routing(settings, &router, batch, [&logits, &s, &r]);
    if let (Some(want), Some(got)) = (&want.coreset, step.coreset()) {
        checks.same("the layer's coreset", &gpu.download::<u32>(got)?, want);
    }
    let assigned: Vec<u32> = gpu.download(step.assigned().ok_or_else(none)?)?;
    checks.same("the layer's choice", &assigned, &want.assigned);
    let sample = [0, tokens - 1];
    let choice = (&want.assigned[..], &want.gates[..]);
    let want = outputs(settings, &|e, p| data.experts.matrix(e, p), &data.x, choice, &sample);
    for (t, want) in sample.into_iter().zip(want) {
        let what = format!("the layer's output of token {t}");
        checks.close(&what, &got[t * d..][..d], &want, OUTPUT * largest(&want), OUTPUT);
    }
    checks.finite("the layer's output", &got);

    let used = expert_union::cpu(&assigned, tokens, e, &offsets, 0).1[0];
    Ok((step, used))
}

/// Times of one rule: of the layer, of its routing from the logits to the plan, both apart, and of its experts.
#[derive(Default)]
struct Laps {
    layer: Vec<f64>,
    routing: Vec<f64>,
    ffn: Vec<f64>,
}

impl Laps {
    fn lap(&mut self, gpu: &Gpu, step: &BoundLayer) -> Result<(), Error> {
        let all: Vec<&Dispatch> = step.dispatches().collect();
        let is_ffn = |d: &&Dispatch| d.name().starts_with("matmul") || d.name() == "combine";
        // The first is the logits.
        let (ffn, routing): (Vec<&Dispatch>, Vec<&Dispatch>) =
            all[1..].iter().copied().partition(is_ffn);
        self.layer.push(wall(gpu, all)?);
        for _ in 0..5 {
            self.routing.push(wall(gpu, routing.iter().copied())?);
        }
        self.ffn.push(wall(gpu, ffn)?);
        Ok(())
    }
}

/// Rounds of timing go on for as long, and are at least as many.
const TIMING: Duration = Duration::from_secs(20);
const ROUNDS: u32 = 3;

/// Times every rule of blocks of [`BLOCK`] tokens.
fn time_rules(
    options: &Options,
    settings: &LayerConfig,
    (gpu, ctx): (&Gpu, &Context),
    rules: &[Rule],
    rows: &mut [Row],
    progress: &Progress,
) -> Result<String, Error> {
    let from = settings.experts;
    let routing = |rule: &Rule| shrink(rule.routing, from, options.experts);
    let settings = {
        let mut config = settings.with_routing(routing(&rules[0]));
        config.experts = options.experts;
        config
    };
    let shape = settings.expert_shape(WeightType::Bf16);
    let bytes = u64::from(shape.experts) * shape.expert_bytes();
    progress.say(format!("making and packing {} MB of expert weights", bytes / 1_000_000));
    let data = Data::new(settings, options.seed);
    let layer = data.upload(gpu, ctx)?;
    let mut timed = vec![];
    for (rule, row) in rules.iter().zip(rows).filter(|(rule, _)| rule.block == BLOCK) {
        progress.say(format!("{}: checking the layer", rule.name));
        let mut checks = checks(rule, progress);
        let layer = layer.with_routing(routing(rule))?;
        let (step, used) = check_layer(gpu, &layer, &data, rule, &mut checks)?;
        row.ok &= checks.ok;
        timed.push((row, step, used, Laps::default()));
    }
    // All rules in turn, so that what else the machine does falls on all alike.
    progress.say("timing the layer");
    let (start, mut rounds) = (Instant::now(), 0);
    while rounds < ROUNDS || start.elapsed() < TIMING {
        for (_, step, _, laps) in &mut timed {
            laps.lap(gpu, step)?;
        }
        rounds += 1;
    }
    for (row, _, used, laps) in timed {
        let layer = median(laps.layer);
        row.layer_ms = Some(layer);
        let (routing, ffn) = (median(laps.routing), median(laps.ffn));
        row.times = Some(Times { used, routing, ffn, layer });
    }
    let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = settings;
    let fewer = if experts < from { ", counts of experts in rules in proportion" } else { "" };
    Ok(format!(
        "One block of {BLOCK} tokens through a layer of D {hidden}, F {intermediate}, {experts} experts in bf16{fewer} and {shared_experts} shared, synthetic weights; medians of {rounds} wall times, submission included"
    ))
}

/// `part` of `whole`, less 1, in percent.
fn off(part: f64, whole: f64) -> String {
    format!("{:+.1} %", (part / whole - 1.0) * 100.0)
}

/// The report as text.
fn tables(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.head {
        let _ = writeln!(text, "{line}");
    }
    let width = report.rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "\n{:<width$} {:>5} {:>9} {:>8} {:>8} {:>7} {:>5} {:>7} {:>8}  check",
        "rule", "block", "published", "measured", "off", "coreset", "used", "MB", "cut"
    );
    // Every block size comes with the original.
    let original = |block| report.rules.iter().find(|r| r.block == block && r.rule == "original");
    for r in &report.rules {
        let published = r.published.map_or("-".into(), |p| format!("{p:.1}"));
        let apart = r.published.map_or("-".into(), |p| off(r.measured, p));
        let cut = match original(r.block) {
            Some(original) if original.rule != r.rule => off(r.bytes, original.bytes),
            _ => "-".into(),
        };
        let _ = writeln!(
            text,
            "{:<width$} {:>5} {published:>9} {:>8.1} {apart:>8} {:>7.1} {:>5.1} {:>7.1} {cut:>8}  {}",
            r.rule,
            r.block,
            r.measured,
            r.coreset,
            r.used,
            r.bytes / 1e6,
            if r.ok { "ok" } else { "WRONG" }
        );
    }
    let Some(layer) = &report.layer else { return text };
    let _ = writeln!(
        text,
        "\n{layer}\n{:<width$} {:>12} {:>10} {:>8} {:>8} {:>9}",
        "rule", "experts used", "routing ms", "FFN ms", "layer ms", "layer"
    );
    let first = report.rules.iter().find_map(|r| r.layer_ms);
    for r in &report.rules {
        let (Some(times), Some(first)) = (&r.times, first) else { continue };
        let _ = writeln!(
            text,
            "{:<width$} {:>12} {:>10.2} {:>8.1} {:>8.1} {:>9}",
            r.rule,
            times.used,
            times.routing,
            times.ffn,
            times.layer,
            off(times.layer, first)
        );
    }
    text
}

/// The experts of a block, published and measured side by side: all rules for 32 tokens, then by block size.
fn picture(rows: &[Row]) -> svg::Document {
    const WIDTH: f64 = 720.0;
    const LEFT: f64 = 150.0;
    const BAR: f64 = 11.0;
    let most =
        rows.iter().flat_map(|r| [r.measured, r.published.unwrap_or(0.0)]).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - 60.0) / most;
    let mut drawn = Group::new();
    let mut y = 34.0;
    let text = |class, x: f64, y: f64, content: String| {
        Text::new(content).set("class", class).set("x", x).set("y", y)
    };
    let bar = |class, y: f64, value: f64| {
        let bar = Rectangle::new()
            .set("class", class)
            .set("x", LEFT)
            .set("y", y)
            .set("width", (value * scale * 10.0).round() / 10.0)
            .set("height", BAR);
        let at = (LEFT + value * scale + 5.0).round();
        Group::new().add(bar).add(text("number", at, y + BAR - 1.5, format!("{value:.1}")))
    };
    let title = "Experts that a block of tokens uses together, LLaDA2.0-mini";
    drawn = drawn.add(text("title", 16.0, y, title.into()));
    y += 22.0;
    for (class, x, label) in [
        ("published", 16.0, "published"),
        ("measured", 106.0, "measured here, synthetic router scores"),
    ] {
        let key = Rectangle::new().set("class", class).set("x", x).set("y", y - 10.0);
        drawn = drawn.add(key.set("width", BAR).set("height", BAR)).add(text(
            "label",
            x + 17.0,
            y,
            label.into(),
        ));
    }
    let by_rule: Vec<&Row> =
        rows.iter().filter(|r| r.block == BLOCK && r.published.is_some()).collect();
    let mut by_size: Vec<&Row> =
        rows.iter().filter(|r| rows.iter().any(|o| o.rule == r.rule && o.block != BLOCK)).collect();
    by_size.sort_by_key(|r| (r.rule == "dMoE, p 0.6", r.block)); // stable
    let parts = [("Blocks of 32 tokens", by_rule, false), ("By tokens of a block", by_size, true)];
    for (heading, part, sizes) in parts {
        y += 32.0;
        drawn = drawn.add(text("heading", 16.0, y, heading.into()));
        y += 10.0;
        for row in part {
            let label =
                if sizes { format!("{}: {}", row.rule, row.block) } else { row.rule.into() };
            drawn = drawn.add(text("label", 16.0, y + BAR + 4.0, label));
            if let Some(published) = row.published {
                drawn = drawn.add(bar("published", y, published));
            }
            drawn = drawn.add(bar("measured", y + BAR + 1.0, row.measured));
            y += 2.0 * BAR + 9.0;
        }
    }
    y += 12.0;
    let note = "dMoE: experts elected for the block, at least 8. Original, top-4, DES and LLaDA2.2: experts used.";
    drawn = drawn.add(text("note", 16.0, y, note.into()));
    let style = Style::new(
        "text{font-family:system-ui,sans-serif;font-size:12px;fill:#1f2328}\
         .title{font-size:15px;font-weight:600}.heading{font-weight:600}.number,.note{font-size:11px}\
         .ground{fill:#ffffff}.published{fill:#8c959f}.measured{fill:#0969da}\
         @media(prefers-color-scheme:dark){text{fill:#e6edf3}.ground{fill:#0d1117}\
         .published{fill:#6e7681}.measured{fill:#4493f8}}",
    );
    let height = y + 16.0;
    svg::Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("role", "img")
        .add(svg::node::element::Title::new(title))
        .add(style)
        .add(Rectangle::new().set("class", "ground").set("width", "100%").set("height", "100%"))
        .add(drawn)
}

fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let (settings, rules) = (mini()?, rules()?);
    for rule in rules.iter().filter(|r| r.block == BLOCK) {
        shrink(rule.routing, settings.experts, options.experts)
            .check(options.experts)
            .map_err(|e| format!("--experts {}: {}: {e}", options.experts, rule.name))?;
    }
    progress.say("opening the device");
    let gpu = match pollster::block_on(Gpu::open(options.adapter.as_deref())) {
        Ok(gpu) => Some(gpu),
        Err(e) if options.adapter.is_some() => return Err(format!("--adapter: {e}")),
        Err(e) => {
            progress.note(&format!("{e}\nthe CPU twins count alone, nothing is timed"));
            None
        }
    };
    let mut head = vec![
        format!(
            "Router scores are synthetic: sigmoid of g = 2 (sqrt({RHO}) Z_block[e] + sqrt({:.1}) Z[t, e]) - 3, Z standard normal, seed {};",
            1.0 - RHO,
            options.seed
        ),
        format!(
            "nothing but that {RHO} was fitted. {} experts, means of {} blocks. published: arXiv 2605.30876 and LLaDA2.2, of real scores.",
            settings.experts, options.blocks
        ),
        "measured: of dMoE the experts elected (coreset), else those used, which a model's groups may make fewer than elected."
            .into(),
        "MB: weights of the experts used, bf16, of one layer; cut: of those, against original.".into(),
    ];
    let Some(gpu) = gpu else {
        head.push("adapter: none (CPU twins)".into());
        let rows = count_on_cpu(options, &settings, &rules, progress);
        return Ok(Report { rules: rows, head, layer: None });
    };
    let say = |e: Error| e.to_string();
    let ctx = Context::new(&gpu.device).map_err(say)?;
    head.push(format!(
        "adapter: {}, {} {}, {}",
        gpu.info.name, gpu.info.driver, gpu.info.driver_info, gpu.info.backend
    ));
    let mut rows = count_on_gpu(options, &settings, &gpu, &ctx, &rules, progress).map_err(say)?;
    let layer = time_rules(options, &settings, (&gpu, &ctx), &rules, &mut rows, progress);
    Ok(Report { rules: rows, head, layer: Some(layer.map_err(say)?) })
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("block_union", |progress| {
        let report = run(&options, progress)?;
        program::save(options.svg.as_deref(), || Ok(picture(&report.rules).to_string()))?;
        let text = program::text_of(&report, options.json, tables)?;
        Ok(Found { text, ok: report.rules.iter().all(|r| r.ok) })
    })
}
