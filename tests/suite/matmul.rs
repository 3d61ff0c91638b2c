//! Every matmul kernel against the CPU twin, on depths of more than two steps of its loop over K:
//! the longest step is 128 (16-bit weights in `matmul_skinny`), and a depth of one or two runs
//! hardly any of the loop.
use testkit::compare::{close, largest};
use testkit::device::context_of;
use testkit::layer::stored;
use testkit::prelude::{Output, contexts, gpu, random, run, variant_name};
use testkit::works::plan;
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, SlotRows, Stage, activate, cpu_row};
use wgmoe::ops::logits::{self, Logits};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{
    Activation, BoundOp, Context, ExpertWeights, Gpu, PlanShape, Target, TileShape, Variant,
    WeightType, wgpu,
};

/// Tokens of each expert: none, skinny items that are whole and not, each number of fours of a small
/// one (after eight rows, of twos), small ones in two parts, tiles (of 32 rows: tiles and a rest).
const ROWS: [usize; 11] = [0, 1, 4, 8, 9, 11, 13, 19, 32, 33, 61];
const TOKENS: usize = 61;
/// Hidden and intermediate size. Depths are loaded by eights, fours and ones, columns are whole
/// quads and not; no depth is a whole number of steps but 384, and no number of columns one of
/// panels.
const SHAPES: [[u32; 2]; 2] = [[304, 300], [299, 384]];

/// A context for each target, and one with matrix units where the device has them: subgroups make no
/// difference here.
fn targets(gpu: &Gpu) -> Vec<Context> {
    let of = |target, matrix| {
        let own = |ctx: &Context| {
            let variant = ctx.variant();
            variant.target == target && variant.matrix == matrix
        };
        contexts(gpu).into_iter().find(own)
    };
    let all = [of(Target::Serial, false), of(Target::Wide, false)];
    let all = all.map(|ctx| ctx.expect("every device runs either"));
    all.into_iter().chain(of(Target::Wide, true)).collect()
}

/// A context for each shape of tiles that is not the likely one.
fn other_tiles(gpu: &Gpu) -> Vec<Context> {
    let best = Variant::best(&gpu.device);
    let small_items = best.small_items;
    [TileShape::Large, TileShape::Halves, TileShape::Small]
        .into_iter()
        .filter(|&tile| tile != best.tile)
        .map(|tile| context_of(gpu, Variant { tile, small_items, ..Variant::PORTABLE }))
        .collect()
}

/// The bit set in which expert e has [`ROWS`]`[e]` tokens, spread over all.
fn assigned() -> Vec<u32> {
    let mut words = bits::empty(TOKENS, ROWS.len());
    for (e, rows) in ROWS.into_iter().enumerate() {
        for i in 0..rows {
            bits::set(&mut words, TOKENS, e, (e * 7 + i * 3) % TOKENS);
        }
    }
    words
}

/// Weights on the device, and what they hold.
struct Experts {
    weights: ExpertWeights,
    /// Gate, up, down of each expert, as stored.
    host: Vec<[Vec<f32>; 3]>,
}

impl Experts {
    fn new(gpu: &Gpu, ctx: &Context, shape: ExpertShape, page_limit: Option<u64>) -> Self {
        let weights =
            ExpertWeights::with_page_limit(ctx, shape, page_limit.unwrap_or(u64::MAX)).unwrap();
        let size = (shape.hidden * shape.intermediate) as usize;
        let mut host = vec![];
        for e in 0..shape.experts {
            host.push(Projection::ALL.map(|p| {
                let values = random(u64::from(3 * e) + p as u64, size);
                weights.write(&gpu.queue, e, p, HostWeights::F32(&values)).unwrap();
                stored(&values, shape.matrix(p)[1], shape.types.of(p))
            }));
        }
        Self { weights, host }
    }

    /// One slot of a stage by the twin.
    fn twin(&self, stage: Stage, e: usize, x: &[f32]) -> Vec<f32> {
        let [gate, up, down] = &self.host[e];
        let rows = |w: &[f32]| cpu_row(x, &|i| w[i], w.len() / x.len());
        match stage {
            Stage::Down => rows(down).into_iter().map(|v| v as f32).collect(),
            Stage::Gate | Stage::Up => unreachable!("halves are in activation.rs"),
            Stage::GateUp(by) => {
                let both = rows(gate).into_iter().zip(rows(up));
                both.map(|(gate, up)| activate(by, gate, up) as f32).collect()
            }
        }
    }
}

/// A plan on the device and its copy here.
struct Plan<'a> {
    shape: &'a PlanShape,
    buffer: &'a wgpu::Buffer,
    host: &'a HostPlan,
}

/// Runs a stage, one kind of item after the other: each must leave the others' rows as they were.
fn check(gpu: &Gpu, ctx: &Context, experts: &Experts, plan: &Plan<'_>, stage: Stage, gather: bool) {
    let shape = experts.weights.shape();
    let projection = match stage {
        Stage::Down => Projection::Down,
        _ => Projection::Gate,
    };
    let [columns, depth] = shape.matrix(projection).map(|n| n as usize);
    let slots = plan.host.token_of.len();
    let x = random(77, if gather { TOKENS } else { slots } * depth);
    let x_in = gpu.upload(&x);
    let out = Output::f32s(gpu, slots * columns);
    let what = format!("{} {shape:?} {stage:?} gather {gather}", variant_name(ctx));
    let rows = SlotRows::from(&x_in);
    let args = Args {
        x: if gather { Rows::Tokens((&x_in).into()) } else { Rows::Slots(rows) },
        plan: plan.buffer.into(),
        weights: &experts.weights,
        places: None,
        out: out.slice().into(),
        slots: 0..slots as u32,
        columns: 0..columns as u32,
    };
    let step = GroupedMatmul::new(ctx, &shape, stage).unwrap().bind(plan.shape, args).unwrap();
    // The dispatches of one kind of item, on all pages.
    let of_kind = |kind: &str| {
        let mine = step.dispatches().iter().filter(|d| d.label().contains(kind));
        mine.fold(BoundOp::default(), |all, d| all.then(d.clone().into()))
    };
    let want: Vec<Vec<f32>> = (0..ROWS.len())
        .flat_map(|e| {
            (plan.host.expert_offsets[e]..plan.host.expert_offsets[e + 1]).map(move |s| (e, s))
        })
        .map(|(e, s)| {
            let row = if gather { plan.host.token_of[s as usize] as usize } else { s as usize };
            experts.twin(stage, e, &x[row * depth..][..depth])
        })
        .collect();
    let compare = |got: &[f32], s: usize| {
        let (got, want) = (&got[s * columns..][..columns], &want[s]);
        close(got, want, 2e-5 * largest(want), 2e-5, &format!("{what}: slot {s}"))
    };
    // Rows that a kind of item makes: what is left of whole tiles, and has so many rows.
    let tile_rows = plan.shape.tile_rows as usize;
    let has_small = !of_kind("small items").dispatches().is_empty();
    let small = if has_small { 32.min(tile_rows - 1) } else { 8 };
    let rows_left = |e: usize, s: usize| {
        let first = plan.host.expert_offsets[e] as usize;
        let end = plan.host.expert_offsets[e + 1] as usize;
        end - (first + (s - first) / tile_rows * tile_rows)
    };
    let left: Vec<usize> = (0..ROWS.len())
        .flat_map(|e| {
            let slots = plan.host.expert_offsets[e]..plan.host.expert_offsets[e + 1];
            slots.map(move |s| rows_left(e, s as usize))
        })
        .collect();
    for (kind, most) in [("skinny", 8), ("small", small), ("tile", usize::MAX)] {
        run(gpu, &of_kind(&format!("{kind} items")));
        let got: Vec<f32> = out.get(gpu);
        for s in 0..slots {
            if left[s] <= most {
                compare(&got, s).unwrap();
            } else {
                let row = &got[s * columns..][..columns];
                assert!(row.iter().all(|v| v.is_nan()), "{what}, {kind}: slot {s} was written");
            }
        }
    }
}

/// The same in every storage type of blocks: a depth of whole blocks of 32 and one that is not.
#[test]
fn deep_expert_matmuls_of_blocks() {
    let Some(gpu) = gpu() else { return };
    let experts = ROWS.len() as u32;
    let logits = random(5, TOKENS * ROWS.len());
    for ctx in targets(&gpu) {
        let made = plan(&gpu, &ctx, [TOKENS as u32, experts], &logits, &assigned()).unwrap();
        let plan = Plan { shape: &made.shape, buffer: &made.plan, host: &made.host };
        for &weight_type in WeightType::ALL.iter().filter(|t| t.block_values() > 1) {
            let all =
                Experts::new(&gpu, &ctx, ExpertShape::new(experts, 300, 288, weight_type), None);
            check(&gpu, &ctx, &all, &plan, Stage::GateUp(Activation::Silu), true);
            check(&gpu, &ctx, &all, &plan, Stage::Down, false);
        }
    }
}

/// Both expert matmuls in packed weights of floats.
#[test]
fn deep_expert_matmuls() {
    let Some(gpu) = gpu() else { return };
    let experts = ROWS.len() as u32;
    let assigned = assigned();
    let logits = random(5, TOKENS * ROWS.len());
    for ctx in targets(&gpu) {
        let made = plan(&gpu, &ctx, [TOKENS as u32, experts], &logits, &assigned).unwrap();
        let plan = Plan { shape: &made.shape, buffer: &made.plan, host: &made.host };
        for [hidden, intermediate] in SHAPES {
            for weight_type in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
                let shape = ExpertShape::new(experts, hidden, intermediate, weight_type);
                let all = Experts::new(&gpu, &ctx, shape, None);
                check(&gpu, &ctx, &all, &plan, Stage::GateUp(Activation::Silu), true);
                check(&gpu, &ctx, &all, &plan, Stage::Down, false);
            }
            // Pages of some experts, and of some columns; rows of x that are slots.
            let weight_type = WeightType::Bf16;
            let shape = ExpertShape::new(experts, hidden, intermediate, weight_type);
            for limit in [2 * shape.device_bytes() / 3, 100 * u64::from(hidden.max(intermediate))] {
                let paged = Experts::new(&gpu, &ctx, shape, Some(limit));
                assert!(paged.weights.page_counts().iter().all(|&n| n > 1), "{limit}: one page");
                check(&gpu, &ctx, &paged, &plan, Stage::GateUp(Activation::Silu), false);
                check(&gpu, &ctx, &paged, &plan, Stage::Down, false);
            }
        }
    }
}

/// Tiles of other shapes differ in which lane has which rows, not in what they load: one shape of experts,
/// a type of which a step is of 8 values and one of 16.
#[test]
fn deep_expert_matmuls_in_other_tiles() {
    let Some(gpu) = gpu() else { return };
    let experts = ROWS.len() as u32;
    let logits = random(5, TOKENS * ROWS.len());
    let [hidden, intermediate] = SHAPES[0];
    for ctx in other_tiles(&gpu) {
        let made = plan(&gpu, &ctx, [TOKENS as u32, experts], &logits, &assigned()).unwrap();
        let plan = Plan { shape: &made.shape, buffer: &made.plan, host: &made.host };
        for weight_type in [WeightType::F32, WeightType::Bf16] {
            let shape = ExpertShape::new(experts, hidden, intermediate, weight_type);
            let all = Experts::new(&gpu, &ctx, shape, None);
            check(&gpu, &ctx, &all, &plan, Stage::GateUp(Activation::Silu), true);
            check(&gpu, &ctx, &all, &plan, Stage::Down, false);
        }
    }
}

/// Router logits: row-major weights in whole 16-byte words, and in rows of any length.
#[test]
fn deep_logits() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (hidden, experts) in [(304, 37), (300, 40), (299, 36), (384, 5)] {
            let op = Logits::new(&ctx, hidden, experts).unwrap();
            let router = random(8, (experts * hidden) as usize);
            let weights = gpu.upload(&router);
            for tokens in [1, 7, 19, 41] {
                let x = random(9, (tokens * hidden) as usize);
                let x_in = gpu.upload(&x);
                let out = Output::f32s(&gpu, (tokens * experts) as usize);
                let (x_in, weights) = ((&x_in).into(), (&weights).into());
                let args = logits::Args { x: x_in, weights, logits: out.slice() };
                run(&gpu, &op.bind(&logits::Dims { tokens }, args).unwrap());
                let want = logits::cpu(&x, &router, hidden as usize);
                let what = format!("{} D {hidden} E {experts} T {tokens}", variant_name(&ctx));
                let got: Vec<f32> = out.get(&gpu);
                close(&got, &want, 2e-5 * largest(&want), 2e-5, &what).unwrap();
            }
        }
    }
}
