//! The way back on matrix units: the matmul by transposed weights and the gradients of weights, each beside
//! the vector kernel's error, over ranges of values, and where the units are not there.
use crate::matrix::{
    ROWS, Value, assert_precise, errors, listed, of_units, precise, variant, vector,
};
use testkit::cases::random;
use testkit::layer::stored;
use testkit::prelude::{Output, gpu, run};
use testkit::works::plan;
use wgmoe::device::MatrixReport;
use wgmoe::ops::{matmul_transposed, weight_gradient};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertGradients, ExpertShape, HostWeights, Projection};
use wgmoe::wgpu::CooperativeScalarType as Scalar;
use wgmoe::{Context, ExpertWeights, Gpu, MatrixUnits, WeightType};

/// Rows of the result: a whole tile of any kernel and a rest of more than a skinny item.
const HEIGHT: usize = 92;
/// What the sums go over: whole steps and, of either matrix of two, half a one.
const DEPTH: usize = 176;
const COLUMNS: usize = 84;

/// A product of the way back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Rows by the down matrix: `DEPTH` is D.
    Down(WeightType),
    /// Rows by gate and up, one after the other: `DEPTH` is 2 F.
    GateUp(WeightType),
    /// Gradients of the down matrix: `DEPTH` is the expert's slots.
    Weights,
}

/// One expert's product of `x [HEIGHT, DEPTH]` and `w [DEPTH, COLUMNS]`.
struct Case {
    kind: Kind,
    x: Vec<f32>,
    w: Vec<f32>,
}

impl Case {
    /// Of values of `x` by their row and their place in it.
    fn new(kind: Kind, value: impl Fn(usize, usize, f32) -> f32) -> Self {
        let x = random(9, HEIGHT * DEPTH).into_iter().enumerate();
        let x = x.map(|(i, v)| value(i / DEPTH, i % DEPTH, v)).collect();
        Self { kind, x, w: random(3, DEPTH * COLUMNS) }
    }

    /// The product in f64, and the sum of the magnitudes that each value is made of.
    fn twin(&self) -> Vec<(f64, f64)> {
        let w = match self.kind {
            Kind::Down(of) | Kind::GateUp(of) => stored(&self.w, COLUMNS as u32, of),
            Kind::Weights => self.w.clone(),
        };
        let rows = self.x.chunks(DEPTH).flat_map(|row| {
            (0..COLUMNS)
                .map(|column| {
                    let products = row.iter().enumerate();
                    let products = products
                        .map(|(k, &x)| f64::from(x) * f64::from(w[k * COLUMNS + column]))
                        .collect::<Vec<_>>();
                    (products.iter().sum(), products.iter().map(|v| v.abs()).sum())
                })
                .collect::<Vec<_>>()
        });
        rows.collect()
    }

    fn run(&self, gpu: &Gpu, ctx: &Context) -> Vec<f32> {
        match self.kind {
            Kind::Down(of) => self.by_weights(gpu, ctx, of, matmul_transposed::Stage::Down),
            Kind::GateUp(of) => self.by_weights(gpu, ctx, of, matmul_transposed::Stage::GateUp),
            Kind::Weights => self.gradient(gpu, ctx),
        }
    }

    fn by_weights(
        &self,
        gpu: &Gpu,
        ctx: &Context,
        of: WeightType,
        stage: matmul_transposed::Stage,
    ) -> Vec<f32> {
        let made = one_expert(gpu, ctx, HEIGHT);
        let [hidden, intermediate] = match stage {
            matmul_transposed::Stage::Down => [DEPTH, COLUMNS],
            matmul_transposed::Stage::GateUp => [COLUMNS, DEPTH / 2],
        };
        let shape = ExpertShape::new(1, hidden as u32, intermediate as u32, of);
        let weights = ExpertWeights::new(ctx, shape).unwrap();
        let (gate, up) = self.w.split_at(DEPTH / 2 * COLUMNS);
        let written: &[(Projection, &[f32])] = match stage {
            matmul_transposed::Stage::Down => &[(Projection::Down, &self.w)],
            matmul_transposed::Stage::GateUp => &[(Projection::Gate, gate), (Projection::Up, up)],
        };
        for &(projection, values) in written {
            weights.write(&gpu.queue, 0, projection, HostWeights::F32(values)).unwrap();
        }
        let g = gpu.upload(&self.x);
        let out = Output::f32s(gpu, HEIGHT * COLUMNS);
        let args = matmul_transposed::Args {
            g: (&g).into(),
            plan: (&made.plan).into(),
            weights: matmul_transposed::Weights::Packed(&weights),
            places: None,
            out: out.slice(),
            out_stride: COLUMNS as u32,
        };
        let op = matmul_transposed::MatmulTransposed::new(ctx, &shape, stage).unwrap();
        run(gpu, &op.bind(&made.shape, args).unwrap());
        out.get(gpu)
    }

    fn gradient(&self, gpu: &Gpu, ctx: &Context) -> Vec<f32> {
        let made = one_expert(gpu, ctx, DEPTH);
        let shape = ExpertShape::new(1, HEIGHT as u32, COLUMNS as u32, WeightType::F32);
        let across = (0..DEPTH).flat_map(|k| (0..HEIGHT).map(move |row| row * DEPTH + k));
        let dy = gpu.upload(&across.map(|i| self.x[i]).collect::<Vec<f32>>());
        let hg = gpu.upload(&self.w);
        let out = ExpertGradients::new(ctx, &shape).unwrap();
        let of = weight_gradient::Of::Down { dy: (&dy).into(), hg: (&hg).into() };
        let plan = (&made.plan).into();
        let args = weight_gradient::Args { of, plan, out: &out, add: false };
        let op = weight_gradient::WeightGradient::new(ctx, &shape).unwrap();
        run(gpu, &op.bind(&made.shape, args).unwrap());
        let pages = out.slices(0, Projection::Down);
        pages.flat_map(|(_, slice)| gpu.download::<f32>(slice).unwrap()).collect()
    }
}

/// The plan of so many tokens that one expert takes all of.
fn one_expert(gpu: &Gpu, ctx: &Context, tokens: usize) -> testkit::works::Planned {
    let mut assigned = bits::empty(tokens, 1);
    (0..tokens).for_each(|t| bits::set(&mut assigned, tokens, 0, t));
    plan(gpu, ctx, [tokens as u32, 1], &vec![0.0; tokens], &assigned).unwrap()
}

fn every_kind() -> impl Iterator<Item = Kind> {
    let types = WeightType::ALL.iter();
    types.flat_map(|&of| [Kind::Down(of), Kind::GateUp(of)]).chain([Kind::Weights])
}

/// Of every way to stage weights one: words of four and of eight columns, blocks of bytes and of six bits.
const KINDS: [Kind; 6] = [
    Kind::Down(WeightType::F32),
    Kind::GateUp(WeightType::F32),
    Kind::GateUp(WeightType::Bf16),
    Kind::Down(WeightType::Q8_0),
    Kind::GateUp(WeightType::Q6_K),
    Kind::Weights,
];

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The table of errors: `Full` is at most twice as far from f64 as the vector kernel, `Half` is what
/// 11 bits give.
#[test]
fn full_precision_is_that_of_the_vector_kernels() {
    let Some(gpu) = gpu() else { return };
    let Some([full, half]) = precise(&gpu) else { return };
    let vector = vector(&gpu);
    // Of one matrix small, of the other ordinary.
    let gate_small: (&str, Value) =
        ("a small half", |_, k, v| if k < DEPTH / 2 { v * 1e-20 } else { v });
    for kind in every_kind() {
        for (name, value) in ROWS.into_iter().chain([gate_small]) {
            let case = Case::new(kind, value);
            let want = case.twin();
            let what = format!("{kind:?}, {name}");
            assert_precise(
                &what,
                [&vector, &full, &half].map(|ctx| errors(&case.run(&gpu, ctx), &want, &what)),
            );
        }
    }
}

/// Rows of f32's whole range and outside it, as the forward matmul's; equal bits from run to run.
#[test]
fn ranges_of_the_way_back_are_those_of_f32() {
    let Some(gpu) = gpu() else { return };
    let Some([full, half]) = precise(&gpu) else { return };
    let vector = vector(&gpu);
    let cases: [(&str, Value); 7] = [
        ("NaN", |row, k, v| if row % 5 == 1 && k == 37 { f32::NAN } else { v }),
        ("inf", |row, k, v| if row % 5 == 1 && k == 137 { f32::INFINITY } else { v }),
        ("-inf and inf", |row, k, v| match k {
            3 if row % 3 == 0 => f32::NEG_INFINITY,
            170 if row % 6 == 0 => f32::INFINITY,
            _ => v,
        }),
        ("all NaN", |_, _, _| f32::NAN),
        ("a late outlier", |row, k, v| if k == 90 && row % 7 == 0 { v * 1e15 } else { v }),
        ("zeros first", |row, k, v| if k < 170 - row { v } else { 0.0 }),
        ("largest", |row, k, v| if k == row { f32::MAX.copysign(v) } else { v * f32::MAX / 1e4 }),
    ];
    for kind in KINDS {
        for (name, value) in cases {
            let mut case = Case::new(kind, value);
            if name == "largest" {
                // So that the sums stay finite.
                case.w.iter_mut().for_each(|w| *w /= 4096.0);
            }
            let want = case.twin();
            // Not a fixed bound: after one value of the row's whole size every sum in f32 rounds at that size.
            let of_f32 = errors(&case.run(&gpu, &vector), &want, &format!("{kind:?}, {name}"));
            for (ctx, bound) in [(&full, 2.0 * of_f32[1]), (&half, 1.1e-3)] {
                let what = format!("{kind:?}, {name}, {}", ctx.matrix());
                let got = case.run(&gpu, ctx);
                if name == "all NaN" {
                    assert!(got.iter().all(|v| v.is_nan()), "{what}");
                } else {
                    let [_, most] = errors(&got, &want, &what);
                    assert!(most < bound, "{what}: off by {most:e}");
                }
                let again = bits_of(&case.run(&gpu, ctx));
                assert_eq!(bits_of(&got), again, "{what}: other bits at the second run");
            }
        }
        // Smaller than f32's normal numbers: as far off as flushing them would be.
        let case = Case::new(kind, |_, _, v| v * 1e-40);
        let got = case.run(&gpu, &full);
        for (got, (want, _)) in got.iter().zip(case.twin()) {
            assert!((f64::from(*got) - want).abs() < 2e-38, "got {got:e}, want {want:e}");
        }
    }
}

/// Infinities, NaN and large values in columns.
#[test]
fn columns_of_the_way_back_that_are_not_finite() {
    let Some(gpu) = gpu() else { return };
    let Some([full, _]) = precise(&gpu) else { return };
    for kind in [Kind::Down(WeightType::Bf16), Kind::GateUp(WeightType::F32), Kind::Weights] {
        let mut case = Case::new(kind, |_, _, v| v);
        for (column, value) in [(0, f32::INFINITY), (33, f32::NAN), (50, 1e37), (83, 1e-37)] {
            for k in [11, 120] {
                case.w[k * COLUMNS + column] = value;
            }
        }
        let got = case.run(&gpu, &full);
        let most = errors(&got, &case.twin(), &format!("{kind:?}"))[1];
        assert!(most < 1e-6, "{kind:?}: {most:e}");
    }
}

/// Bits of a row and a column do not hang on the others of their tile, though some of those make it run
/// anew.
#[test]
fn no_gradient_changes_for_another() {
    let Some(gpu) = gpu() else { return };
    let Some([full, _]) = precise(&gpu) else { return };
    for kind in [Kind::Down(WeightType::Bf16), Kind::GateUp(WeightType::Q8_0), Kind::Weights] {
        let calm = bits_of(&Case::new(kind, |_, _, v| v).run(&gpu, &full));
        let mut case = Case::new(kind, |row, k, v| if row == 7 && k == 50 { v * 1e6 } else { v });
        if kind != Kind::GateUp(WeightType::Q8_0) {
            case.w[60 * COLUMNS + 13] = 1e6;
        }
        let odd = bits_of(&case.run(&gpu, &full));
        let (mut same, mut others) = (0, 0);
        for (i, (calm, odd)) in calm.iter().zip(&odd).enumerate() {
            if i / COLUMNS == 7 || i % COLUMNS == 13 {
                others += u32::from(calm != odd);
            } else {
                assert_eq!(calm, odd, "{kind:?}: row {}, column {}", i / COLUMNS, i % COLUMNS);
                same += 1;
            }
        }
        assert!(same > 0 && others > 50, "{kind:?}: {same}, {others}");
    }
}

/// Squares that lavapipe does not list: see `squares_that_are_not_listed`.
#[test]
fn squares_of_the_way_back_that_are_not_listed() {
    let Some(gpu) = gpu() else { return };
    if std::env::var_os("WGMOE_UNLISTED").is_none() || precise(&gpu).is_none() {
        eprintln!("not run: squares that no software driver lists, without WGMOE_UNLISTED=1");
        return;
    }
    for shape in [listed(8, Scalar::F32), listed(16, Scalar::F16)] {
        let ctx = of_units(&gpu, MatrixUnits::of_shapes([shape], &gpu.queue));
        assert!(matches!(ctx.matrix(), MatrixReport::InUse { .. }), "{}", ctx.matrix());
        for kind in [Kind::GateUp(WeightType::Bf16), Kind::Down(WeightType::Q8_0), Kind::Weights] {
            let case = Case::new(kind, |row, _, v| v * [1.0, 1e-30, 1e30, 1e-3][row % 4]);
            let what = format!("{kind:?}, {}", ctx.matrix());
            let [_, most] = errors(&case.run(&gpu, &ctx), &case.twin(), &what);
            assert!(most < 1e-6, "{what}: off by {most:e}");
        }
    }
}

/// Where the check of the units fails, or they are not handed over, the vector kernels run, with their own
/// bits.
#[test]
fn the_way_back_without_units_is_the_vector_kernels() {
    let Some(gpu) = gpu() else { return };
    let units = MatrixUnits::of_shapes([listed(8, Scalar::F16)], &gpu.queue).with_fault();
    let without =
        [of_units(&gpu, units), Context::with_variant(&gpu.device, variant(&gpu)).unwrap()];
    for kind in [Kind::Down(WeightType::Bf16), Kind::GateUp(WeightType::Q8_0), Kind::Weights] {
        let case = Case::new(kind, |_, _, v| v);
        let want = bits_of(&case.run(&gpu, &vector(&gpu)));
        for ctx in &without {
            assert_eq!(bits_of(&case.run(&gpu, ctx)), want, "{kind:?}: {}", ctx.matrix());
        }
        // The test would see it if they ran.
        if let Some([full, _]) = precise(&gpu) {
            assert_ne!(bits_of(&case.run(&gpu, &full)), want, "{kind:?}");
        }
    }
}
