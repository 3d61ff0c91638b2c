//! The output of the layer: each token's experts, weighted by their gates and summed in expert order. In
//! the backward pass, the gradient of the hidden states: the same sum without gates.
use super::{by_width, copy_lanes, not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::LOOP_ITERATIONS;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_rows};
use crate::plan::{HostPlan, bits};
use crate::{BoundOp, Context, Error, FloatType, Floats, PlanShape, Result, Slice, Target};
use std::ops::Range;
use std::sync::Arc;

/// See `shaders/combine.wgsl`.
pub const SPEC: Spec = Spec {
    name: "combine",
    body: include_str!("../../shaders/combine.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("y", 4),
        read("plan", 4),
        read("active_bits", 4),
        read("residual", 4),
        write("out", 4),
    ],
    variants: || {
        let all = FloatType::ALL.into_iter();
        let of = |target, t| widths(target, t).iter().map(move |&width| prelude(target, t, width));
        all.flat_map(|t| Target::ALL.into_iter().flat_map(move |target| of(target, t))).collect()
    },
};

params! {
    tokens: u32, slots: u32, most_slots: u32, vectors: u32, out_vectors: u32, first_vector: u32, add: u32, token_offsets: u32,
    slot_of: u32, gate_of: u32, first_slot: u32, continued: u32, summed: u32, has_active: u32, first_token: u32,
    weighted: u32, has_residual: u32, stretch: u32,
}

/// Values of a lane's vector, most first. Software drivers pay for a load by its components: 64-bit ones hold twice as much.
fn widths(target: Target, float_type: FloatType) -> &'static [u32] {
    match (float_type, target) {
        (FloatType::F32, Target::Wide) => &[4, 1],
        (FloatType::F32, Target::Serial) => &[8, 4, 1],
        (FloatType::F16 | FloatType::Bf16, _) => &[4, 2],
    }
}

/// Vectors that a workgroup takes of a row. A lane takes one. On software drivers, where a workgroup costs as much as several
/// vectors, it takes up to 64, one after the other: fewer where a token may have so many slots that the loops over both would
/// be too long. (A loop over slots counts one iteration more, and the loop over vectors its own.)
fn stretch(target: Target, shape: &PlanShape) -> u32 {
    let vectors = match target {
        Target::Wide => 1,
        Target::Serial => (LOOP_ITERATIONS / (2 + u64::from(shape.all_experts()))).clamp(1, 64),
    };
    copy_lanes(target) * vectors as u32
}

/// `width` values a lane.
fn prelude(target: Target, float_type: FloatType, width: u32) -> Prelude {
    let lanes = copy_lanes(target);
    let wide = width == 8;
    let (row, vector) =
        if wide { ("vec4<u64>", "mat2x4<f32>") } else { ("Vector", super::vector(width)) };
    let (stored, out) = match (float_type, width) {
        (FloatType::F32, 8) => (row, piece!("combine/floats_wide")),
        (FloatType::F32, _) => (row, piece!("combine/floats")),
        (_, 2) => ("u32", piece!("combine/halves_two")),
        _ => ("vec2<u32>", piece!("combine/halves_four")),
    };
    let prelude = Prelude::new(format!("{}, vectors of {width}, {lanes} lanes", float_type.name()))
        .constant("WG", lanes)
        .flag("MANY", target == Target::Serial)
        .alias("Vector", vector)
        .alias("Row", row)
        .alias("Stored", stored)
        .piece(piece!("common/grid"))
        .maybe_piece(float_type.halves())
        .maybe_piece(wide.then_some(piece!("common/eight_values")))
        .maybe_piece(wide.then_some(piece!("common/wide_floats")))
        .piece(if wide { piece!("combine/rows_wide") } else { piece!("combine/rows") })
        .piece(out);
    if wide { prelude.needs(wgpu::Features::SHADER_INT64) } else { prelude }
}

/// The CPU twin: `[tokens, hidden]` from `y`, rows of `hidden` for all slots of the plan (and perhaps
/// more, as its shape has room for); `residual` `[tokens, hidden]` is added where there is one.
///
/// # Panics
///
/// If `hidden` is 0, if `y` is not whole rows of `hidden` or fewer than the plan's slots, or if
/// `residual` is not `[tokens, hidden]`; the message names the argument.
pub fn cpu(plan: &HostPlan, y: &[f32], hidden: usize, residual: Option<&[f32]>) -> Vec<f32> {
    let gates: Vec<f64> = plan.gate_of.iter().map(|&g| g.into()).collect();
    sum(plan, &gates, y, hidden, residual)
}

/// The same without gates, for rows that have them in them already: the gradients of a token's slots.
///
/// # Panics
///
/// As [`cpu`].
pub fn cpu_sum(plan: &HostPlan, y: &[f32], hidden: usize, residual: Option<&[f32]>) -> Vec<f32> {
    sum(plan, &vec![1.0; plan.token_of.len()], y, hidden, residual)
}

fn sum(
    plan: &HostPlan,
    gates: &[f64],
    y: &[f32],
    hidden: usize,
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let rows = expect_rows("y", y.len(), "hidden", hidden);
    let slots = plan.token_of.len();
    assert!(rows >= slots, "`y`: expected {slots} rows, got {rows}");
    if let Some(residual) = residual {
        expect_len("residual", residual.len(), plan.token_offsets.len().saturating_sub(1) * hidden);
    }
    let mut out = vec![];
    for (t, span) in plan.token_offsets.windows(2).enumerate() {
        let slots = &plan.slot_of[span[0] as usize..span[1] as usize];
        for h in 0..hidden {
            let sum: f64 = slots
                .iter()
                .map(|&s| gates[s as usize] * f64::from(y[s as usize * hidden + h]))
                .sum();
            out.push((sum + residual.map_or(0.0, |r| r[t * hidden + h].into())) as f32);
        }
    }
    out
}

/// The CPU twin where only the tokens of a bit set `active`, `[ceil(tokens / 32)]`, are combined: their rows
/// of `out`, `[tokens, hidden]`, are replaced, or added to where `add`; the others stay as they are.
///
/// # Panics
///
/// As [`cpu`], or if `active` or `out` do not fit the plan's tokens.
pub fn cpu_active(
    plan: &HostPlan,
    y: &[f32],
    hidden: usize,
    active: &[u32],
    add: bool,
    out: &mut [f32],
) {
    let residual = add.then(|| out.to_vec());
    let all = cpu(plan, y, hidden, residual.as_deref());
    expect_len("out", out.len(), all.len());
    expect_len("active", active.len(), bits::columns(all.len() / hidden));
    for (t, (out, row)) in out.chunks_mut(hidden).zip(all.chunks(hidden)).enumerate() {
        if active[t / 32] >> (t % 32) & 1 == 1 {
            out.copy_from_slice(row);
        }
    }
}

/// Buffers of one dispatch.
#[derive(Clone, Debug)]
pub struct Args<'a> {
    /// `[slots, columns]` f32, read: what the experts made of these columns, all slots of the plan's shape.
    pub y: Slice<'a>,
    /// A plan of the shape, read.
    pub plan: Slice<'a>,
    /// `[tokens, hidden]`, rows of whole 32-bit words: these columns are written, or added to. Sums are
    /// f32, rounded once.
    pub out: Floats<'a>,
    /// The columns of `out` that `y` holds; `0..hidden` for all. In f16 and bf16 an even number from
    /// an even one on.
    pub columns: Range<u32>,
    /// Elements of a row of `out`.
    pub hidden: u32,
    /// Whether to add to what `out` holds (a residual) rather than to replace it.
    pub add: bool,
}

/// What `y` holds.
#[derive(Clone, Debug)]
pub(crate) enum Sums {
    /// Rows of these slots. Where `continued`, `out` (f32) holds the sums of the slots before them, which
    /// go on.
    Slots { slots: Range<u32>, continued: bool },
    /// The sums of these tokens, a row a token.
    Ready,
}

/// What one dispatch combines.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    /// Tokens whose rows `out` is.
    pub(crate) tokens: Range<u32>,
    pub(crate) y: Sums,
    /// `[ceil(tokens / 32)]` u32, of all tokens of the plan.
    pub(crate) active: Option<Slice<'a>>,
}

impl<'a> Part<'a> {
    /// All slots of all tokens. A shape of too many slots is an error of `bind`.
    fn all(shape: &PlanShape, active: Option<Slice<'a>>) -> Self {
        let slots = 0..shape.slots().unwrap_or(u32::MAX);
        Self { tokens: 0..shape.tokens, y: Sums::Slots { slots, continued: false }, active }
    }
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Combine {
    ctx: Context,
    /// Of f32, by width of their vectors, widest first; that of f16 or bf16 is compiled when such an output is first bound.
    floats: Vec<(u32, Arc<Kernel>)>,
}

impl Combine {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let target = ctx.variant().target;
        let widths = widths(target, FloatType::F32);
        let of = |width| prelude(target, FloatType::F32, width);
        let floats = by_width(ctx, &SPEC, widths, of)?;
        Ok(Self { ctx: ctx.clone(), floats })
    }

    /// Combines the slots of each token.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], columns outside the row, or a slice that does not fit ([`Error`]);
    /// [`Error::Device`] where wgpu refuses a kernel for f16 or bf16, which the first such `bind` compiles.
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        self.bind_part(shape, args, Part::all(shape, None))
    }

    /// As [`Combine::bind`], for the tokens of a bit set `active`, `[ceil(tokens / 32)]` u32, read: rows of
    /// the others stay as they are.
    ///
    /// # Errors
    ///
    /// As [`Combine::bind`].
    pub fn bind_active(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        active: Slice<'_>,
    ) -> Result<BoundOp> {
        self.bind_part(shape, args, Part::all(shape, Some(active)))
    }

    /// Sums the slots of each token as they are, without gates, and with `residual` `[tokens, hidden]`
    /// f32 where there is one.
    ///
    /// # Errors
    ///
    /// As [`Combine::bind`]; a residual beside an output that is not f32.
    pub fn bind_sum(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        residual: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        if let Some(residual) = residual {
            residual.f32s("residual", &[shape.tokens.into(), args.hidden.into()])?;
            if args.out.float_type != FloatType::F32 {
                let reason = format!("beside an output of {}", args.out.float_type.name());
                return Err(Error::invalid("residual", reason));
            }
        }
        self.bind_as(shape, args, Part::all(shape, None), (false, residual))
    }

    /// The same for a part of the plan.
    pub(crate) fn bind_part(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        part: Part<'_>,
    ) -> Result<BoundOp> {
        self.bind_as(shape, args, part, (true, None))
    }

    /// The same, with gates or without, perhaps with a residual.
    fn bind_as(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        part: Part<'_>,
        (weighted, residual): (bool, Option<Slice<'_>>),
    ) -> Result<BoundOp> {
        let at = shape.sections()?;
        let Part { tokens: of, y, active } = part;
        let (tokens, hidden) = (of.end - of.start, args.hidden);
        let (first_slot, slots, continued, summed) = match y {
            Sums::Ready => (0, tokens, false, true),
            Sums::Slots { slots, continued } => {
                (slots.start, slots.end - slots.start, continued, false)
            }
        };
        let Range { start, end } = args.columns;
        not_zero(&[("hidden", hidden)])?;
        if start >= end || end > hidden {
            return Err(Error::invalid("columns", format!("{start}..{end} of {hidden}")));
        }
        let columns = end - start;
        args.y.f32s("y", &[slots.into(), columns.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.out.holds("out", tokens.into(), hidden.into())?;
        if let Some(active) = active {
            active.u32s("active", &[shape.tokens.div_ceil(32).into()])?;
        }
        let target = self.ctx.variant().target;
        let fits = |n: u32| [hidden, columns, start].iter().all(|v| v.is_multiple_of(n));
        let made = || self.floats.iter().find(|(width, _)| fits(*width)).cloned();
        let (vector, kernel) = match args.out.float_type {
            FloatType::F32 => made().expect("every length is a multiple of 1"),
            float_type => {
                let widths = widths(target, float_type);
                let Some(&width) = widths.iter().find(|&&width| fits(width)) else {
                    let reason = format!("{start}..{end} of {}, must be even", float_type.name());
                    return Err(Error::invalid("columns", reason));
                };
                (width, self.ctx.kernel(&SPEC, prelude(target, float_type, width))?)
            }
        };
        let stretch = stretch(target, shape);
        let params = Params {
            stretch,
            tokens,
            slots,
            most_slots: shape.slots()?,
            vectors: columns / vector,
            out_vectors: hidden / vector,
            first_vector: start / vector,
            add: args.add.into(),
            token_offsets: at.token_offsets + of.start,
            slot_of: at.slot_of,
            gate_of: at.gate_of,
            first_slot,
            continued: continued.into(),
            summed: summed.into(),
            has_active: active.is_some().into(),
            first_token: of.start,
            weighted: weighted.into(),
            has_residual: residual.is_some().into(),
        };
        let [active_bits, residual] = [active, residual].map(|s| or_nothing(&self.ctx, s));
        let slices = [args.y, args.plan, active_bits, residual, args.out.slice];
        let groups = u64::from(tokens) * u64::from((columns / vector).div_ceil(stretch));
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
