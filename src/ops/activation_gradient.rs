//! Backwards through the activation, slot by slot: from the gradient of the activated values to that of
//! the pre-activation, and what the gradients of the gates and of Wdown need on the way.
//!
//! With `a = act(z[..F])`, `h = a z[F..]` and `dA` the gradient of `gate * h` as
//! [`matmul_transposed`](super::matmul_transposed) gives it:
//!
//! | | |
//! |---|---|
//! | `hg = gate h` | what [`weight_gradient`](super::weight_gradient) multiplies by `dy` |
//! | `dgate = sum of dA h` | summed in one fixed order |
//! | `dz = gate [dA z[F..] act'(z[..F]) , dA a]` | in place of `dA` |
use super::activation::{ALL, slots_at};
use super::not_zero;
use crate::device::shader::{Piece, Prelude, Spec, params, piece, read, read_uniform, write};
use crate::device::{Kernel, quirks};
use crate::error::{expect_len, expect_rows};
use crate::routing::Activation;
use crate::{BoundOp, Context, PlanShape, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/activation_gradient.wgsl`.
pub const SPEC: Spec = Spec {
    name: "activation_gradient",
    body: include_str!("../../shaders/activation_gradient.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("z", 4),
        read_uniform("plan", 4),
        write("dz", 4),
        write("hg", 4),
        write("dgate", 4),
    ],
    variants: || {
        let of = |variant| ALL.map(|activation| prelude(variant, activation));
        Prelude::distinct(Variant::EVERY.into_iter().flat_map(of))
    },
};

params! { intermediate: u32, slots_at: u32, gate_of: u32 }

/// Lanes of a workgroup, and of those that work on a slot.
fn lanes(variant: Variant) -> [u32; 2] {
    match (variant.target, variant.subgroups) {
        (Target::Serial, _) => [8, 1],
        (Target::Wide, false) => [64, 64],
        (Target::Wide, true) => [128, 128],
    }
}

fn slope(activation: Activation) -> Piece {
    match activation {
        Activation::Silu => piece!("gradient/slope_silu"),
        Activation::Gelu => piece!("gradient/slope_gelu"),
    }
}

fn prelude(variant: Variant, activation: Activation) -> Prelude {
    let [wg, lanes] = lanes(variant);
    let (label, reduce) = match (variant.target, variant.subgroups) {
        (Target::Serial, _) => ("one lane a slot", piece!("common/reduce_serial")),
        (Target::Wide, false) => ("workgroup reductions", piece!("common/reduce_workgroup")),
        (Target::Wide, true) => ("subgroup reductions", piece!("common/reduce_subgroup")),
    };
    let subgroups = variant.subgroups && variant.target == Target::Wide;
    Prelude::new(format!("{activation:?}, {label}"))
        .needs(if subgroups { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() })
        .constant("WG", wg)
        .constant("LANES", lanes)
        .constant("ROWS", wg / lanes)
        .piece(piece!("common/grid"))
        .piece(slope(activation))
        .piece(reduce)
}

/// The activation of a gate and its slope, in f64.
pub fn cpu_slope(activation: Activation, v: f64) -> [f64; 2] {
    match activation {
        Activation::Silu => {
            let share = 1.0 / (1.0 + (-v).exp());
            [v * share, share * (1.0 + v * (1.0 - share))]
        }
        Activation::Gelu => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (root * (v + 0.044715 * v.powi(3))).tanh();
            let rise = root * (1.0 + 3.0 * 0.044715 * v * v);
            let slope = (1.0 + tanh) / 2.0 + v / 2.0 * (1.0 - tanh * tanh) * rise;
            [v * (1.0 + tanh) / 2.0, slope]
        }
    }
}

/// What the twin gives: `dz [slots, 2F]`, `hg [slots, F]`, `dgate [slots]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostGradients {
    /// `[slots, 2F]`: of the pre-activation.
    pub dz: Vec<f32>,
    /// `[slots, F]`: gate times activated value.
    pub hg: Vec<f32>,
    /// `[slots]`: of the gates.
    pub dgate: Vec<f32>,
}

/// The CPU twin, from `z [slots, 2F]`, the gates `[slots]` and `da [slots, F]`; in f64 rounded once.
///
/// # Panics
///
/// If `da` or `z` is not as long as the gates ask for; the message names the argument.
pub fn cpu(z: &[f32], gates: &[f32], da: &[f32], activation: Activation) -> HostGradients {
    let mut all = HostGradients::default();
    if gates.is_empty() {
        return all;
    }
    let f = da.len() / gates.len();
    expect_rows("da", da.len(), "gates", gates.len());
    expect_len("z", z.len(), 2 * da.len());
    for (s, &gate) in gates.iter().enumerate() {
        let gate = f64::from(gate);
        let (zg, zu) = z[2 * s * f..][..2 * f].split_at(f);
        let (mut dzg, mut dzu, mut dgate) = (vec![], vec![], 0.0);
        for ((&zg, &zu), &da) in zg.iter().zip(zu).zip(&da[s * f..]) {
            let [a, slope] = cpu_slope(activation, zg.into());
            let (zu, da) = (f64::from(zu), f64::from(da));
            dgate += da * a * zu;
            all.hg.push((gate * a * zu) as f32);
            dzg.push((gate * da * zu * slope) as f32);
            dzu.push((gate * da * a) as f32);
        }
        all.dz.extend(dzg.into_iter().chain(dzu));
        all.dgate.push(dgate as f32);
    }
    all
}

/// Buffers of one dispatch. All f32 but the plan.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[slots, 2F]`, all slots of the shape, read.
    pub z: Slice<'a>,
    /// A plan of the shape, read; in a buffer that is not written.
    pub plan: Slice<'a>,
    /// `[slots, 2F]`: `dA` in the first F columns, replaced by the gradient of `z` in the rows of the
    /// slots that the plan holds.
    pub dz: Slice<'a>,
    /// `[slots, F]`, written in those rows.
    pub hg: Slice<'a>,
    /// `[slots]`, written for those slots, shared experts' too.
    pub dgate: Slice<'a>,
    /// F.
    pub intermediate: u32,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ActivationGradient {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl ActivationGradient {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context, activation: Activation) -> Result<Self> {
        let kernel = ctx.kernel(&SPEC, prelude(ctx.variant(), activation))?;
        Ok(Self { ctx: ctx.clone(), kernel })
    }

    /// The slots of a plan.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; F of 0, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        let (slots, f) = (shape.slots()?, args.intermediate);
        not_zero(&[("intermediate", f)])?;
        if slots == 0 {
            return Ok(BoundOp::default());
        }
        let [wg, lanes] = lanes(self.ctx.variant());
        quirks::check_loops(&self.ctx, "intermediate", f, u64::from(f.div_ceil(lanes)) + 16)?;
        args.z.f32s("z", &[slots.into(), 2, f.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.dz.f32s("dz", &[slots.into(), 2, f.into()])?;
        args.hg.f32s("hg", &[slots.into(), f.into()])?;
        args.dgate.f32s("dgate", &[slots.into()])?;
        let params =
            Params { intermediate: f, slots_at: slots_at(shape, &at), gate_of: at.gate_of };
        let slices = [args.z, args.plan, args.dz, args.hg, args.dgate];
        let groups = u64::from(slots.div_ceil(wg / lanes));
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
