//! The matmul on matrix units: its error beside the vector kernel's, its ranges, and what runs where
//! the units are not there. What needs the units says so where the device has none.
use testkit::cases::random;
use testkit::device::matrix_units;
use testkit::layer::stored;
use testkit::prelude::{Output, contexts, gpu, run, variant_name};
use testkit::works::plan;
use wgmoe::device::MatrixReport;
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, Stage, activate, cpu_row};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::wgpu::{CooperativeMatrixProperties, CooperativeScalarType as Scalar};
use wgmoe::{
    Activation, Context, ContextOptions, ExpertWeights, Gpu, MatrixUnits, Precision, Target,
    Variant, WeightType,
};

/// One expert with so many rows: a whole tile of any kernel and a rest of more than a skinny item.
const TOKENS: usize = 90;
const HIDDEN: usize = 84;
const INTERMEDIATE: usize = 176;

/// With the kernels of GPUs, whatever the device: it is theirs that matrix units replace.
pub(crate) fn variant(gpu: &Gpu) -> Variant {
    Variant { target: Target::Wide, matrix: true, ..Variant::best(&gpu.device) }
}

pub(crate) fn of_units(gpu: &Gpu, units: MatrixUnits) -> Context {
    let options = ContextOptions::default().with_variant(variant(gpu)).with_matrix_units(units);
    Context::with_options(&gpu.device, options).unwrap()
}

/// The contexts of both precisions, or none with a note.
pub(crate) fn precise(gpu: &Gpu) -> Option<[Context; 2]> {
    let of = |precision| of_units(gpu, matrix_units(gpu).with_precision(precision));
    let both = [of(Precision::Full), of(Precision::Half)];
    let used = both.iter().all(|ctx| matches!(ctx.matrix(), MatrixReport::InUse { .. }));
    if !used {
        eprintln!("not run: {}", both[0].matrix());
    }
    used.then_some(both)
}

pub(crate) fn vector(gpu: &Gpu) -> Context {
    let variant = Variant { matrix: false, ..variant(gpu) };
    Context::with_variant(&gpu.device, variant).unwrap()
}

/// The down matrix of an expert, and rows to multiply by it.
struct Case {
    weight_type: WeightType,
    /// `[HIDDEN, INTERMEDIATE]`, before it is stored.
    weights: Vec<f32>,
    /// `[rows, INTERMEDIATE]`; [`TOKENS`] of them unless cut short.
    x: Vec<f32>,
}

impl Case {
    fn new(weight_type: WeightType, value: impl Fn(usize, usize, f32) -> f32) -> Self {
        let x = random(9, TOKENS * INTERMEDIATE).into_iter().enumerate();
        let x = x.map(|(i, v)| value(i / INTERMEDIATE, i % INTERMEDIATE, v)).collect();
        Self { weight_type, weights: random(3, HIDDEN * INTERMEDIATE), x }
    }

    fn shape(&self) -> ExpertShape {
        ExpertShape::new(1, HIDDEN as u32, INTERMEDIATE as u32, self.weight_type)
    }

    /// `[TOKENS, HIDDEN]` in f64, and the sum of the magnitudes that each is made of.
    fn twin(&self) -> Vec<(f64, f64)> {
        let weights = stored(&self.weights, INTERMEDIATE as u32, self.weight_type);
        let magnitudes: Vec<f32> = weights.iter().map(|w| w.abs()).collect();
        let rows = self.x.chunks(INTERMEDIATE).flat_map(|row| {
            let sizes: Vec<f32> = row.iter().map(|v| v.abs()).collect();
            let sizes = cpu_row(&sizes, &|i| magnitudes[i], HIDDEN);
            cpu_row(row, &|i| weights[i], HIDDEN).into_iter().zip(sizes)
        });
        rows.collect()
    }

    fn run(&self, gpu: &Gpu, ctx: &Context) -> Vec<f32> {
        let rows = self.x.len() / INTERMEDIATE;
        let mut assigned = bits::empty(rows, 1);
        (0..rows).for_each(|t| bits::set(&mut assigned, rows, 0, t));
        let made = plan(gpu, ctx, [rows as u32, 1], &vec![0.0; rows], &assigned).unwrap();
        let weights = ExpertWeights::new(ctx, self.shape()).unwrap();
        let down = HostWeights::F32(&self.weights);
        weights.write(&gpu.queue, 0, Projection::Down, down).unwrap();
        let x = gpu.upload(&self.x);
        let out = Output::f32s(gpu, rows * HIDDEN);
        let args = Args {
            x: Rows::Slots((&x).into()),
            plan: (&made.plan).into(),
            weights: &weights,
            places: None,
            out: out.slice().into(),
            slots: 0..rows as u32,
            columns: 0..HIDDEN as u32,
        };
        let op = GroupedMatmul::new(ctx, &self.shape(), Stage::Down).unwrap();
        run(gpu, &op.bind(&made.shape, args).unwrap());
        out.get(gpu)
    }
}

/// Root of the mean square, and the largest, of the errors of finite values, each as a share of the
/// magnitudes that its sum is made of; values that are not finite must be the same.
pub(crate) fn errors(got: &[f32], want: &[(f64, f64)], what: &str) -> [f64; 2] {
    let (mut squares, mut most, mut count) = (0.0, 0f64, 0u32);
    for (&got, &(want, size)) in got.iter().zip(want) {
        if (want as f32).is_finite() {
            let error = (f64::from(got) - want).abs() / size;
            assert!(error.is_finite(), "{what}: got {got}, want {want}");
            (squares, most, count) = (squares + error * error, most.max(error), count + 1);
        } else {
            let same = (want.is_nan() && got.is_nan()) || want as f32 == got;
            assert!(same, "{what}: got {got}, want {want}");
        }
    }
    [(squares / f64::from(count)).sqrt(), most]
}

pub(crate) type Value = fn(usize, usize, f32) -> f32;

/// Rows of ordinary and of awkward values.
pub(crate) const ROWS: [(&str, Value); 6] = [
    ("ordinary", |_, _, v| v),
    ("rows of 1e-30", |_, _, v| v * 1e-30),
    ("rows of 1e30", |_, _, v| v * 1e30),
    ("rows mixed", |row, _, v| v * [1.0, 1e-30, 1e30, 1e-3][row % 4]),
    ("values from 1e-5 to 1e5", |_, k, v| v * 10f32.powi((k * 7 % 11) as i32 - 5)),
    ("one value of 1e4", |_, k, v| if k == 100 { v * 1e4 } else { v }),
];

/// A row of a table of errors, of a vector kernel, `Full` and `Half`: `Full` is at most twice as far from f64 as
/// the vector kernel, `Half` is what 11 bits give.
pub(crate) fn assert_precise(what: &str, [by_vector, by_full, by_half]: [[f64; 2]; 3]) {
    println!("{what}: vector {by_vector:?}, Full {by_full:?}, Half {by_half:?}");
    assert!(by_full[0] <= 2.0 * by_vector[0], "{what}: {by_full:?}, {by_vector:?}");
    // Of single values, whose error may be nothing by chance.
    assert!(by_full[1] <= 4.0 * by_vector[1], "{what}: {by_full:?}, {by_vector:?}");
    assert!(by_half[1] <= 1.1e-3, "{what}: {by_half:?}");
    assert!(by_half[0] > 10.0 * by_full[0], "{what}: half is no other precision");
}

/// The table of errors: `Full` is at most twice as far from f64 as the vector kernel, `Half` is what
/// 11 bits give.
#[test]
fn full_precision_is_that_of_the_vector_kernel() {
    let Some(gpu) = gpu() else { return };
    let Some([full, half]) = precise(&gpu) else { return };
    let vector = vector(&gpu);
    for &weight_type in WeightType::ALL {
        for (name, value) in ROWS {
            let case = Case::new(weight_type, value);
            let want = case.twin();
            let what = format!("{weight_type:?}, {name}");
            assert_precise(
                &what,
                [&vector, &full, &half].map(|ctx| errors(&case.run(&gpu, ctx), &want, &what)),
            );
        }
    }
}

/// The largest finite values and the smallest become no infinities or NaN that the sums do not have;
/// infinities and NaN give what the twin has, and leave other rows alone.
#[test]
fn ranges_are_those_of_f32() {
    let Some(gpu) = gpu() else { return };
    let Some([full, half]) = precise(&gpu) else { return };
    let largest: Value =
        |row, k, v| if k == row { f32::MAX.copysign(v) } else { v * f32::MAX / 1e4 };
    let cases: [(&str, Value); 7] = [
        ("NaN", |row, k, v| if row % 5 == 1 && k == 37 { f32::NAN } else { v }),
        ("inf", |row, k, v| if row % 5 == 1 && k == 37 { f32::INFINITY } else { v }),
        ("-inf and inf", |row, k, v| match k {
            3 if row % 3 == 0 => f32::NEG_INFINITY,
            170 if row % 6 == 0 => f32::INFINITY,
            _ => v,
        }),
        ("all NaN", |_, _, _| f32::NAN),
        ("a late outlier", |row, k, v| if k == 90 && row % 7 == 0 { v * 1e15 } else { v }),
        ("zeros first", |row, k, v| if k < 170 - row { v } else { 0.0 }),
        ("largest", largest),
    ];
    for weight_type in [WeightType::Bf16, WeightType::F32, WeightType::Q8_0] {
        for (name, value) in cases {
            let mut case = Case::new(weight_type, value);
            if name == "largest" {
                // So that the sums stay finite.
                case.weights.iter_mut().for_each(|w| *w /= 4096.0);
            }
            let want = case.twin();
            for (ctx, bound) in [(&full, 1e-6), (&half, 1.1e-3)] {
                let what = format!("{weight_type:?}, {name}, {}", ctx.matrix());
                let got = case.run(&gpu, ctx);
                if name != "all NaN" {
                    let [_, most] = errors(&got, &want, &what);
                    assert!(most < bound, "{what}: off by {most:e}");
                }
                assert!(name != "all NaN" || got.iter().all(|v| v.is_nan()), "{what}");
                let again = case.run(&gpu, ctx);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&again), "{what}: other bits at the second run");
            }
        }
        // Smaller than f32's normal numbers: as far off as flushing them would be.
        let case = Case::new(weight_type, |_, _, v| v * 1e-40);
        let got = case.run(&gpu, &full);
        for (got, (want, _)) in got.iter().zip(case.twin()) {
            assert!((f64::from(*got) - want).abs() < 2e-38, "got {got:e}, want {want:e}");
        }
    }
}

/// Infinities and large values in weights: a column that is not finite is as the twin's.
#[test]
fn columns_that_are_not_finite() {
    let Some(gpu) = gpu() else { return };
    let Some([full, _]) = precise(&gpu) else { return };
    for weight_type in [WeightType::Bf16, WeightType::F32] {
        let mut case = Case::new(weight_type, |_, _, v| v);
        for (column, value) in [(0, f32::INFINITY), (33, f32::NAN), (50, 1e37), (83, 1e-37)] {
            for k in [11, 120] {
                case.weights[column * INTERMEDIATE + k] = value;
            }
        }
        let got = case.run(&gpu, &full);
        let most = errors(&got, &case.twin(), &format!("{weight_type:?}"))[1];
        assert!(most < 1e-6, "{most:e}");
    }
}

/// Bits of a row and a column do not hang on the others of their tile, though some of those make it run
/// anew.
#[test]
fn no_row_changes_for_another() {
    let Some(gpu) = gpu() else { return };
    let Some([full, _]) = precise(&gpu) else { return };
    let bits = |case: &Case| case.run(&gpu, &full).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let calm = bits(&Case::new(WeightType::Bf16, |_, _, v| v));
    let mut case =
        Case::new(WeightType::Bf16, |row, k, v| if row == 7 && k == 50 { v * 1e6 } else { v });
    case.weights[13 * INTERMEDIATE + 60] = 1e6;
    let odd = bits(&case);
    let (mut same, mut others) = (0, 0);
    for (i, (calm, odd)) in calm.iter().zip(&odd).enumerate() {
        if i / HIDDEN == 7 || i % HIDDEN == 13 {
            others += u32::from(calm != odd);
        } else {
            assert_eq!(calm, odd, "row {}, column {}", i / HIDDEN, i % HIDDEN);
            same += 1;
        }
    }
    assert!(same > 0 && others > 100, "{same}, {others}");
}

/// Nor on how many rows their item has: those of half a tile and less are shared out otherwise.
#[test]
fn no_row_changes_with_the_rows_of_its_item() {
    let Some(gpu) = gpu() else { return };
    let Some([full, half]) = precise(&gpu) else { return };
    // Q8_0 is cut in two, bf16 is not.
    for weight_type in [WeightType::Bf16, WeightType::Q8_0] {
        let case = Case::new(weight_type, |_, _, v| v);
        for ctx in [&full, &half] {
            let whole = case.run(&gpu, ctx);
            for rows in [9, 16, 17, 31, 32, 33, 48, 49, 63, 64] {
                let x = case.x[..rows * INTERMEDIATE].to_vec();
                let part = Case { x, weights: case.weights.clone(), ..case }.run(&gpu, ctx);
                assert_eq!(part, whole[..rows * HIDDEN], "{rows} rows, {}", ctx.matrix());
            }
        }
    }
}

/// Gate and up of rows that overflow f16, through the activation.
#[test]
fn gated_rows_of_any_range() {
    let Some(gpu) = gpu() else { return };
    let Some([full, _]) = precise(&gpu) else { return };
    gated(&gpu, &full);
}

fn gated(gpu: &Gpu, ctx: &Context) {
    let (hidden, intermediate) = (INTERMEDIATE, HIDDEN);
    let shape = ExpertShape::new(1, hidden as u32, intermediate as u32, WeightType::Bf16);
    let x: Vec<f32> = random(9, TOKENS * hidden)
        .into_iter()
        .enumerate()
        .map(|(i, v)| v * [1.0, 3e5, f32::INFINITY, 1e-6][i / hidden % 4])
        .collect();
    let matrices = [1, 2].map(|seed| random(seed, hidden * intermediate));
    let mut assigned = bits::empty(TOKENS, 1);
    (0..TOKENS).for_each(|t| bits::set(&mut assigned, TOKENS, 0, t));
    let made = plan(gpu, ctx, [TOKENS as u32, 1], &[0.0; TOKENS], &assigned).unwrap();
    let weights = ExpertWeights::new(ctx, shape).unwrap();
    for (p, values) in [Projection::Gate, Projection::Up].into_iter().zip(&matrices) {
        weights.write(&gpu.queue, 0, p, HostWeights::F32(values)).unwrap();
    }
    let x_in = gpu.upload(&x);
    let out = Output::f32s(gpu, TOKENS * intermediate);
    let args = Args {
        x: Rows::Tokens((&x_in).into()),
        plan: (&made.plan).into(),
        weights: &weights,
        places: None,
        out: out.slice().into(),
        slots: 0..TOKENS as u32,
        columns: 0..intermediate as u32,
    };
    let op = GroupedMatmul::new(ctx, &shape, Stage::GateUp(Activation::Silu)).unwrap();
    run(gpu, &op.bind(&made.shape, args).unwrap());
    let got: Vec<f32> = out.get(gpu);
    let [gate, up] = matrices.map(|m| stored(&m, hidden as u32, WeightType::Bf16));
    for (row, got) in x.chunks(hidden).zip(got.chunks(intermediate)) {
        let gate = cpu_row(row, &|i| gate[i], intermediate);
        let up = cpu_row(row, &|i| up[i], intermediate);
        let want: Vec<f64> = gate
            .into_iter()
            .zip(up)
            .map(|(gate, up)| activate(Activation::Silu, gate, up))
            .collect();
        let scale = want.iter().fold(0f64, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
        for (&got, &want) in got.iter().zip(&want) {
            if want.is_finite() {
                assert!(
                    (f64::from(got) - want).abs() <= 2e-5 * scale,
                    "got {got:e}, want {want:e}"
                );
            } else {
                assert!(!got.is_finite(), "got {got:e}, want {want:e}");
            }
        }
    }
}

/// Squares as an adapter lists them, with f32 sums.
pub(crate) fn listed(side: u32, ab_type: Scalar) -> CooperativeMatrixProperties {
    CooperativeMatrixProperties {
        m_size: side,
        n_size: side,
        k_size: side,
        ab_type,
        cr_type: Scalar::F32,
        saturating_accumulation: false,
    }
}

/// lavapipe lists squares of 8 of f16 alone. It multiplies others too, outside the specification, and
/// takes minutes to compile those of 16: `WGMOE_UNLISTED=1` runs them, for the kernel's indices.
#[test]
fn squares_that_are_not_listed() {
    let Some(gpu) = gpu() else { return };
    if std::env::var_os("WGMOE_UNLISTED").is_none() || precise(&gpu).is_none() {
        eprintln!("not run: squares that no software driver lists, without WGMOE_UNLISTED=1");
        return;
    }
    for shape in [listed(8, Scalar::F32), listed(16, Scalar::F16)] {
        let ctx = of_units(&gpu, MatrixUnits::of_shapes([shape], &gpu.queue));
        assert!(matches!(ctx.matrix(), MatrixReport::InUse { .. }), "{}", ctx.matrix());
        for weight_type in [WeightType::Bf16, WeightType::Q8_0] {
            let case = Case::new(weight_type, |row, _, v| v * [1.0, 1e-30, 1e30, 1e-3][row % 4]);
            let what = format!("{weight_type:?}, {}", ctx.matrix());
            let [_, most] = errors(&case.run(&gpu, &ctx), &case.twin(), &what);
            assert!(most < 1e-6, "{what}: off by {most:e}");
        }
        gated(&gpu, &ctx);
    }
}

/// Without the features, without a shape, and with a shape that fails the check, the vector kernels run,
/// with their own bits, and the context says why.
#[test]
fn what_cannot_be_used_is_left_out_and_said() {
    let Some(gpu) = gpu() else { return };
    let case = Case::new(WeightType::Bf16, |_, _, v| v);
    let want = case.run(&gpu, &vector(&gpu));
    let has = gpu.device.features().contains(MatrixUnits::FEATURES);
    let of_shapes = |shapes: &[CooperativeMatrixProperties]| {
        of_units(&gpu, MatrixUnits::of_shapes(shapes, &gpu.queue))
    };
    let offered = [listed(8, Scalar::F16)];
    for (ctx, why) in [
        (Context::with_variant(&gpu.device, variant(&gpu)).unwrap(), "no matrix units were handed"),
        (of_shapes(&[listed(16, Scalar::I32)]), if has { "no shape" } else { "the device lacks" }),
        (of_shapes(&[]), if has { "no shape" } else { "the device lacks" }),
        (
            of_units(&gpu, MatrixUnits::of_shapes(offered, &gpu.queue).with_fault()),
            if has { "8x8x8 of f16 fails: got" } else { "the device lacks" },
        ),
    ] {
        let report = ctx.matrix().to_string();
        assert!(report.starts_with("vector kernels") && report.contains(why), "{report}");
        assert_eq!(case.run(&gpu, &ctx), want, "{report}");
    }
    // A device of the same adapter that was made without them.
    let plain = testkit::device::plain(&testkit::device::adapter());
    let units = MatrixUnits::of_shapes(offered, &plain.queue);
    let options = ContextOptions::default().with_variant(variant(&gpu)).with_matrix_units(units);
    let ctx = Context::with_options(&plain.device, options).unwrap();
    assert!(ctx.matrix().to_string().contains("the device lacks"), "{}", ctx.matrix());
    assert_eq!(case.run(&plain, &ctx).len(), want.len());
}

/// Contexts for matrix units are among those that every other test goes over, where there are some.
#[test]
fn every_test_of_all_variants_has_them() {
    let Some(gpu) = gpu() else { return };
    if precise(&gpu).is_some() {
        let all = contexts(&gpu);
        let mine = all.iter().filter(|ctx| ctx.variant().matrix);
        let names: Vec<String> = mine.map(variant_name).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}
