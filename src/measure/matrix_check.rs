//! The check of matrix units before they are used: one small matmul of each shape, compared with its
//! CPU twin.
use crate::device::matrix::{MatrixReport, MatrixShape, MatrixUnits, Precision, decide};
use crate::ops::grouped_matmul::{Args, GroupedMatmul, Rows, Stage, cpu_row};
use crate::weights::{ExpertShape, HostWeights, Projection};
use crate::{Context, ContextOptions, ExpertWeights, Gpu, PlanShape, Result, Variant, WeightType};

/// Rows, columns and depth of the check: whole squares and parts of some, more than two steps.
const ROWS: u32 = 37;
const COLUMNS: u32 = 76;
const DEPTH: u32 = 44;

impl Context {
    /// A context with a choice of variant, pipeline cache and matrix units.
    ///
    /// Matrix units are checked first: a small matmul is submitted to their queue and waited for,
    /// and its result compared with the CPU twin's. Where it differs, or the device or its adapter
    /// lack something, the vector kernels run, and [`Context::matrix`] says why.
    ///
    /// # Errors
    ///
    /// As [`Context::with_variant`].
    pub fn with_options(device: &wgpu::Device, options: ContextOptions) -> Result<Self> {
        let variant = options.variant.unwrap_or_else(|| Variant::best(device));
        let make = |report| Self::make(device, variant, options.clone(), report);
        let plain = make(MatrixReport::NotOffered)?;
        let Some(units) = &options.units else { return Ok(plain) };
        let mut checked = None;
        let check = |shape| {
            let precision = units.precision;
            let ctx = make(MatrixReport::InUse { shape, precision, failed: vec![] });
            let ctx = ctx.map_err(|e| e.to_string())?;
            run(&ctx, units, shape)?;
            checked = Some(ctx);
            Ok(())
        };
        let report = decide(
            variant,
            device.features(),
            device.adapter_info().subgroup_max_size,
            Some((&units.shapes, units.precision)),
            check,
        );
        match (checked, &report) {
            // The one that has the kernels already, unless it knows less than the report.
            (Some(ctx), MatrixReport::InUse { failed, .. }) if failed.is_empty() => Ok(ctx),
            _ => make(report),
        }
    }
}

/// Fails, in words, where a shape gives something else than the twin.
fn run(ctx: &Context, units: &MatrixUnits, shape: MatrixShape) -> Result<(), String> {
    let [x, w] = [values(ROWS * DEPTH, 1), values(COLUMNS * DEPTH, 2)];
    // Rows of very small and very large values, each under a scale of its own.
    let depth = DEPTH as usize;
    let x: Vec<f32> = x
        .chunks(depth)
        .zip([1.0, 1e-30, 1e30].into_iter().cycle())
        .flat_map(|(row, scale)| row.iter().map(move |v| v * scale))
        .collect();
    let mut got = product(ctx, units, &x, &w).map_err(|e| e.to_string())?;
    if units.fault {
        got[COLUMNS as usize + 1] *= 1.5;
    }
    let bound = match units.precision {
        _ if shape.has_floats() => 1e-6,
        Precision::Full => 1e-6,
        Precision::Half => 2e-3,
    };
    for (row, got) in x.chunks(depth).zip(got.chunks(COLUMNS as usize)) {
        let want = cpu_row(row, &|i| w[i], COLUMNS as usize);
        for ((column, &want), &got) in w.chunks(depth).zip(&want).zip(got) {
            let size: f64 = row.iter().zip(column).map(|(x, w)| f64::from(x * w).abs()).sum();
            let off = (f64::from(got) - want).abs() / size;
            // NaN is no smaller.
            if off.partial_cmp(&bound) != Some(std::cmp::Ordering::Less) {
                return Err(format!("got {got:e} where the CPU has {want:e}"));
            }
        }
    }
    Ok(())
}

/// Numbers of both signs between 2^-4 and 1 of magnitude, and none that f16 holds.
fn values(len: u32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let magnitude = (0.0625 + 0.9375 * (state >> 8) as f32 / 16_777_216.0).min(1.0);
        if state & 1 << 31 == 0 { magnitude } else { -magnitude }
    };
    (0..len).map(|_| next()).collect()
}

/// `x [ROWS, DEPTH]` times `w [COLUMNS, DEPTH]`, as the down matrix of the one expert of a plan.
fn product(ctx: &Context, units: &MatrixUnits, x: &[f32], w: &[f32]) -> Result<Vec<f32>> {
    let device = ctx.device();
    let gpu =
        Gpu { device: device.clone(), queue: units.queue.clone(), info: device.adapter_info() };
    let shape = ExpertShape::new(1, COLUMNS, DEPTH, WeightType::F32);
    let weights = ExpertWeights::new(ctx, shape)?;
    weights.write(&gpu.queue, 0, Projection::Down, HostWeights::F32(w))?;
    let plan_shape = PlanShape::new(ctx, ROWS, 1, ROWS);
    let at = plan_shape.sections()?;
    let mut plan = vec![0u32; at.words as usize];
    plan[at.expert_offsets as usize + 1] = ROWS;
    let items = ROWS.div_ceil(plan_shape.tile_rows);
    plan[at.tile_offsets as usize + 1] = items;
    for item in 0..items {
        plan[(at.tile_items + 2 * item) as usize + 1] = item * plan_shape.tile_rows;
    }
    let [x, plan] = [gpu.upload(x), gpu.upload(&plan)];
    let out = gpu.upload(&vec![f32::NAN; (ROWS * COLUMNS) as usize]);
    let args = Args {
        x: Rows::Slots((&x).into()),
        plan: (&plan).into(),
        weights: &weights,
        places: None,
        out: (&out).into(),
        slots: 0..ROWS,
        columns: 0..COLUMNS,
    };
    gpu.run(&GroupedMatmul::new(ctx, &shape, Stage::Down)?.bind(&plan_shape, args)?)?;
    gpu.download(&out)
}
