//! Matmuls by transposed weights against the CPU twin: every storage type, packed and in place, every
//! split into pages, depths of more than a step of each loop and rests of every kind.
use testkit::compare::{close, exact, largest, same};
use testkit::layer::stored;
use testkit::prelude::{Output, gpu, random, run, variant_name};
use testkit::works::plan;
use wgmoe::device::Floats;
use wgmoe::ops::matmul_transposed::{
    Args, Dense, DenseArgs, MatmulTransposed, RowWeights, Stage, Weights, cpu, cpu_row,
};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{Context, Error, ExpertWeights, Gpu, PlanShape, Target, WeightType, wgpu};

/// Tokens of each expert: none, one, two, a whole skinny item, one more, a tile and a rest, more tiles.
const ROWS: [usize; 7] = [0, 1, 2, 8, 9, 19, 77];
const TOKENS: usize = 77;

/// Weights on the device, and what they hold.
struct Experts {
    shape: ExpertShape,
    weights: ExpertWeights,
    /// Gate, up, down of each expert, as stored.
    host: Vec<[Vec<f32>; 3]>,
}

impl Experts {
    fn new(gpu: &Gpu, ctx: &Context, shape: ExpertShape, page_limit: u64) -> Self {
        let weights = ExpertWeights::with_page_limit(ctx, shape, page_limit).unwrap();
        let size = (shape.hidden * shape.intermediate) as usize;
        let host = (0..shape.experts).map(|e| {
            Projection::ALL.map(|p| {
                let values = random(u64::from(3 * e) + p as u64, size);
                weights.write(&gpu.queue, e, p, HostWeights::F32(&values)).unwrap();
                stored(&values, shape.matrix(p)[1], shape.types.of(p))
            })
        });
        let host = host.collect();
        Self { shape, weights, host }
    }

    /// The matrices that a stage goes through, of each expert.
    fn of(&self, stage: Stage) -> Vec<Vec<&[f32]>> {
        let each = self.host.iter();
        each.map(|[gate, up, down]| match stage {
            Stage::Down => vec![&down[..]],
            Stage::GateUp => vec![&gate[..], &up[..]],
        })
        .collect()
    }

    /// Each projection of all experts one after the other, row-major.
    fn row_major(&self, gpu: &Gpu) -> [wgpu::Buffer; 3] {
        std::array::from_fn(|p| {
            let all: Vec<f32> = self.host.iter().flat_map(|e| e[p].clone()).collect();
            let mut bytes = match self.shape.types.gate_up {
                WeightType::F32 => bytemuck::cast_slice(&all).to_vec(),
                halves => halves.encode(&all, 1),
            };
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            gpu.upload(&bytes)
        })
    }
}

struct Plan<'a> {
    shape: &'a PlanShape,
    buffer: &'a wgpu::Buffer,
    host: &'a HostPlan,
}

/// Rows and columns of the matrices that a stage goes through.
fn matrix(shape: &ExpertShape, stage: Stage) -> [usize; 2] {
    let projection = if stage == Stage::Down { Projection::Down } else { Projection::Gate };
    shape.matrix(projection).map(|n| n as usize)
}

/// Runs a stage twice and compares with the twin; between the rows of `out` lies what no kernel writes.
fn check(gpu: &Gpu, ctx: &Context, all: &Experts, rows: bool, plan: &Plan<'_>, stage: Stage) {
    let [depth, columns] = matrix(&all.shape, stage);
    let slots = plan.host.token_of.len();
    let g = match stage {
        Stage::Down => random(77, TOKENS * depth),
        Stage::GateUp => random(78, slots * 2 * depth),
    };
    let g_in = gpu.upload(&g);
    let stride = columns + 4;
    let out = Output::f32s(gpu, slots * stride);
    let in_place = all.row_major(gpu);
    let [gate, up, down] = [0, 1, 2].map(|p| match all.shape.types.gate_up {
        WeightType::F16 => Floats::f16(&in_place[p]),
        WeightType::Bf16 => Floats::bf16(&in_place[p]),
        _ => (&in_place[p]).into(),
    });
    let weights = if rows {
        Weights::Rows(RowWeights { gate, up, down })
    } else {
        Weights::Packed(&all.weights)
    };
    let args = Args {
        g: (&g_in).into(),
        plan: plan.buffer.into(),
        weights,
        places: None,
        out: out.slice(),
        out_stride: stride as u32,
    };
    let what = format!("{} {:?} {stage:?} rows {rows}", variant_name(ctx), all.shape);
    let op = MatmulTransposed::new(ctx, &all.shape, stage).unwrap();
    let step = op.bind(plan.shape, args).unwrap_or_else(|e| panic!("{what}: {e}"));
    let want = cpu(plan.host, stage, &g, &all.of(stage), columns);
    run(gpu, &step);
    let got: Vec<f32> = out.get(gpu);
    for s in 0..slots {
        let (got, want) = (&got[s * stride..][..stride], &want[s * columns..][..columns]);
        assert!(got[columns..].iter().all(|v| v.is_nan()), "{what}: slot {s}: past its columns");
        let of = format!("{what}: slot {s}");
        close(&got[..columns], want, 2e-5 * largest(want), 2e-5, &of).unwrap();
    }
    run(gpu, &step);
    same(&exact(&out.get::<f32>(gpu)), &exact(&got), &format!("{what}: again")).unwrap();
}

fn assigned() -> Vec<u32> {
    let mut words = bits::empty(TOKENS, ROWS.len());
    for (e, rows) in ROWS.into_iter().enumerate() {
        for i in 0..rows {
            bits::set(&mut words, TOKENS, e, (e * 7 + i * 3) % TOKENS);
        }
    }
    words
}

/// A context for every kernel that there is: on GPUs subgroups make no difference here, and the kernels on
/// matrix units are the same for all.
fn contexts(gpu: &Gpu) -> Vec<Context> {
    let own = |v: wgmoe::Variant| match v.target {
        Target::Serial => !v.matrix,
        Target::Wide => v.matrix || !v.subgroups,
    };
    testkit::prelude::contexts(gpu).into_iter().filter(|ctx| own(ctx.variant())).collect()
}

/// Does something by a plan of [`ROWS`] in every variant.
fn each_variant(check: impl Fn(&Gpu, &Context, &Plan<'_>)) {
    let Some(gpu) = gpu() else { return };
    let logits = random(5, TOKENS * ROWS.len());
    for ctx in contexts(&gpu) {
        let dims = [TOKENS as u32, ROWS.len() as u32];
        let made = plan(&gpu, &ctx, dims, &logits, &assigned()).unwrap();
        check(&gpu, &ctx, &Plan { shape: &made.shape, buffer: &made.plan, host: &made.host });
    }
}

const STAGES: [Stage; 2] = [Stage::Down, Stage::GateUp];
const EXPERTS: u32 = ROWS.len() as u32;

/// Floats: sides loaded by eights, fours and ones, whole panels and not.
#[test]
fn of_floats_packed_and_in_place() {
    each_variant(|gpu, ctx, plan| {
        for ([hidden, intermediate], weight_type, in_place) in [
            ([136, 148], WeightType::F32, true),
            ([139, 141], WeightType::F32, true),
            ([264, 64], WeightType::F32, false),
            ([139, 141], WeightType::F16, false),
            ([264, 64], WeightType::F16, true),
            ([148, 136], WeightType::Bf16, false),
            ([264, 64], WeightType::Bf16, true),
        ] {
            let shape = ExpertShape::new(EXPERTS, hidden, intermediate, weight_type);
            let all = Experts::new(gpu, ctx, shape, u64::MAX);
            for stage in STAGES {
                check(gpu, ctx, &all, false, plan, stage);
                if in_place {
                    check(gpu, ctx, &all, true, plan, stage);
                }
            }
        }
    });
}

#[test]
fn of_blocks() {
    each_variant(|gpu, ctx, plan| {
        // How blocks are opened does not hang on how rows of `g` are loaded.
        let subgroups = gpu.device.features().contains(wgpu::Features::SUBGROUP);
        if ctx.variant().target == Target::Serial && ctx.variant().subgroups != subgroups {
            return;
        }
        for &weight_type in WeightType::ALL.iter().filter(|t| t.block_values() > 1) {
            let shape = ExpertShape::new(EXPERTS, 160, 261, weight_type);
            let all = Experts::new(gpu, ctx, shape, u64::MAX);
            for stage in STAGES {
                check(gpu, ctx, &all, false, plan, stage);
            }
        }
    });
}

/// Pages of some experts, and of some of the rows that a sum goes over.
#[test]
fn of_every_split_into_pages() {
    each_variant(|gpu, ctx, plan| {
        // Columns of whole eights, and of fours alone.
        for (hidden, intermediate, weight_type) in
            [(200, 104, WeightType::F32), (204, 108, WeightType::F32), (200, 104, WeightType::Q8_0)]
        {
            let shape = ExpertShape::new(EXPERTS, hidden, intermediate, weight_type);
            let mut seen = vec![];
            for share in [3, 24, 60] {
                let limit = 10 * shape.device_bytes() / share;
                let all = Experts::new(gpu, ctx, shape, limit);
                seen.push(all.weights.page_counts());
                for stage in STAGES {
                    check(gpu, ctx, &all, false, plan, stage);
                }
            }
            // Of several experts, of one, and of less than one.
            let [many, one, less] = seen[..] else { unreachable!() };
            let experts = EXPERTS as usize;
            assert!(many[0] < experts && one[0] <= experts && less[1] > experts, "{seen:?}");
        }
    });
}

#[test]
fn of_one_matrix_for_all_rows() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for [rows, columns] in [[64, 136], [37, 148], [40, 139], [36, 8], [1, 1]] {
            let op = Dense::new(&ctx, rows as u32, columns as u32).unwrap();
            let weights = random(8, rows * columns);
            let w_in = gpu.upload(&weights);
            for tokens in [1, 7, 16, 81] {
                let (g, before) = (random(9, tokens * rows), random(10, tokens * columns));
                let g_in = gpu.upload(&g);
                let products = g.chunks_exact(rows);
                let products = products.flat_map(|g| cpu_row(g, &|i| weights[i], columns));
                let products: Vec<f64> = products.collect();
                for add in [false, true] {
                    let out = Output::holding(&gpu, &before);
                    let (g, weights) = ((&g_in).into(), (&w_in).into());
                    let args = DenseArgs { g, weights, out: out.slice(), add };
                    run(&gpu, &op.bind(tokens as u32, args).unwrap());
                    let sum = |(a, b): (&f64, &f32)| a + if add { f64::from(*b) } else { 0.0 };
                    let want = products.iter().zip(&before).map(|both| sum(both) as f32);
                    let want: Vec<f32> = want.collect();
                    let got: Vec<f32> = out.get(&gpu);
                    let what = format!("{} {rows} {columns} {tokens}", variant_name(&ctx));
                    close(&got, &want, 2e-5 * largest(&want), 2e-5, &what).unwrap();
                }
            }
        }
    }
}

/// Weights that hold some of the experts, in another order, as a cache of experts has them.
#[test]
fn of_experts_that_are_placed() {
    each_variant(|gpu, ctx, plan| {
        let shape = ExpertShape::new(4, 72, 40, WeightType::Bf16);
        let all = Experts::new(gpu, ctx, shape, 3 * shape.device_bytes() / 2);
        let places = [9, 3, 9, 1, 2, 9, 0u32];
        let places_in = gpu.upload(&places);
        for stage in STAGES {
            let [depth, columns] = matrix(&shape, stage);
            let slots = plan.host.token_of.len();
            let rows = if stage == Stage::Down { TOKENS } else { 2 * slots };
            let g = random(7, rows * depth);
            let (g_in, out) = (gpu.upload(&g), Output::f32s(gpu, slots * columns));
            let args = Args {
                g: (&g_in).into(),
                plan: plan.buffer.into(),
                weights: Weights::Packed(&all.weights),
                places: Some((&places_in).into()),
                out: out.slice(),
                out_stride: columns as u32,
            };
            let op = MatmulTransposed::new(ctx, &shape, stage).unwrap();
            run(gpu, &op.bind(plan.shape, args).unwrap());
            let got: Vec<f32> = out.get(gpu);
            let of = all.of(stage);
            let absent = vec![vec![0.0; depth * columns]; 2];
            let placed = places.map(|p| {
                let own = of.get(p as usize).cloned();
                own.unwrap_or_else(|| absent[..of[0].len()].iter().map(|m| &m[..]).collect())
            });
            let want = cpu(plan.host, stage, &g, &placed, columns);
            for (e, place) in places.into_iter().enumerate() {
                for s in plan.host.expert_offsets[e]..plan.host.expert_offsets[e + 1] {
                    let at = s as usize * columns..(s as usize + 1) * columns;
                    let what = format!("{} {stage:?} expert {e}", variant_name(ctx));
                    if place == 9 {
                        assert!(got[at].iter().all(|v| v.is_nan()), "{what}: left alone");
                    } else {
                        close(&got[at.clone()], &want[at], 1e-3, 2e-5, &what).unwrap();
                    }
                }
            }
        }
    });
}

/// NaN goes through where it is, and no further; infinite weights of one expert are not seen by others.
#[test]
fn nan_goes_through() {
    each_variant(|gpu, ctx, plan| {
        let shape = ExpertShape::new(EXPERTS, 70, 44, WeightType::F32);
        let mut all = Experts::new(gpu, ctx, shape, u64::MAX);
        // The first values of the expert behind the one with 9 rows, and the last row of that one: what a
        // step that is not whole would read past its rows, and what it may read in their place.
        for p in Projection::ALL {
            let columns = shape.matrix(p)[1] as usize;
            all.host[5][p as usize][..200].fill(f32::INFINITY);
            all.host[4][p as usize].rchunks_exact_mut(columns).next().unwrap().fill(f32::INFINITY);
        }
        let in_place = all.row_major(gpu);
        let [gate, up, down] = [0, 1, 2].map(|p| Floats::from(&in_place[p]));
        for stage in STAGES {
            let [depth, columns] = matrix(&shape, stage);
            let slots = plan.host.token_of.len();
            let rows = if stage == Stage::Down { TOKENS } else { 2 * slots };
            let mut g = random(7, rows * depth);
            g[5 * depth + depth - 1] = f32::NAN;
            let (g_in, out) = (gpu.upload(&g), Output::holding(gpu, &vec![0f32; slots * columns]));
            let args = Args {
                g: (&g_in).into(),
                plan: plan.buffer.into(),
                weights: Weights::Rows(RowWeights { gate, up, down }),
                places: None,
                out: out.slice(),
                out_stride: columns as u32,
            };
            let op = MatmulTransposed::new(ctx, &shape, stage).unwrap();
            run(gpu, &op.bind(plan.shape, args).unwrap());
            let got: Vec<f32> = out.get(gpu);
            let want = cpu(plan.host, stage, &g, &all.of(stage), columns);
            let classes = |values: &[f32]| -> Vec<u8> {
                values
                    .iter()
                    .map(|v| u8::from(v.is_nan()) + 2 * u8::from(v.is_infinite()))
                    .collect()
            };
            assert!(want.iter().any(|v| v.is_nan()) && want.iter().any(|v| v.is_infinite()));
            let what = format!("{} {stage:?}", variant_name(ctx));
            same(&classes(&got), &classes(&want), &what).unwrap();
        }
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    each_variant(|gpu, ctx, plan| {
        let shape = ExpertShape::new(EXPERTS, 24, 12, WeightType::Bf16);
        let all = Experts::new(gpu, ctx, shape, u64::MAX);
        let slots = plan.host.token_of.len();
        let g = gpu.upload(&vec![0f32; TOKENS * 24]);
        let out = gpu.upload(&vec![0f32; slots * 24]);
        let args = Args {
            g: (&g).into(),
            plan: plan.buffer.into(),
            weights: Weights::Packed(&all.weights),
            places: None,
            out: (&out).into(),
            out_stride: 24,
        };
        let op = MatmulTransposed::new(ctx, &shape, Stage::Down).unwrap();
        assert!(op.bind(plan.shape, args).is_ok());
        let refused = |name: &str, args: Args<'_>| {
            let error = op.bind(plan.shape, args).expect_err(name);
            assert!(error.to_string().contains(name), "{name}: {error}");
        };
        refused("out_stride", Args { out_stride: 13, ..args });
        refused("out_stride", Args { out_stride: 11, ..args });
        refused("g", Args { g: (&out).into(), ..args });
        refused("out", Args { out: (&g).into(), ..args });
        let halves = Floats::bf16(&g);
        let rows = RowWeights { gate: halves, up: halves, down: halves };
        refused("weights", Args { weights: Weights::Rows(rows), ..args });
        let other = ExpertShape::new(EXPERTS, 24, 16, WeightType::Bf16);
        let other = ExpertWeights::new(ctx, other).unwrap();
        refused("weights", Args { weights: Weights::Packed(&other), ..args });
        let more = plan.shape.with_item_rows(1000, 8);
        let error = op.bind(&more, args).expect_err("tile rows");
        assert!(matches!(error, Error::Invalid { name: "tile_rows", .. }), "{error}");
    });
}
