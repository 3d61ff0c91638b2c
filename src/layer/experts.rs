//! What follows a plan: the experts' two matmuls, and the combination into the output.
use super::batch::Batch;
use super::bound::BoundLayer;
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::ops::combine::{self, Combine};
use crate::ops::gather::{Gather, WindowArgs};
use crate::ops::grouped_matmul::{self, GroupedMatmul, Rows, SlotRows, Stage};
use crate::routing::Activation;
use crate::weights::{ExpertWeights, PANEL};
use crate::{BoundOp, Context, Error, FloatType, Floats, PlanShape, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// The experts of a layer, with their kernels.
#[derive(Clone, Debug)]
pub(super) struct Experts {
    pub(super) ctx: Context,
    pub(super) weights: ExpertWeights,
    kernels: Arc<Kernels>,
}

#[derive(Debug)]
struct Kernels {
    gate_up: GroupedMatmul,
    down: GroupedMatmul,
    combine: Combine,
    /// For hidden states larger than a binding.
    gather: Gather,
}

/// Where the experts read and write.
#[derive(Clone, Copy)]
pub(super) struct InOut<'a> {
    pub(super) hidden: Floats<'a>,
    pub(super) out: Floats<'a>,
    pub(super) add: bool,
}

/// The dispatches that follow a plan.
pub(super) struct ExpertSteps {
    pub(super) gate_up: Vec<BoundOp>,
    /// The second matmul of each stretch of columns, and what combines it into `out`.
    pub(super) down: Vec<(Vec<BoundOp>, Vec<BoundOp>)>,
}

/// What the kernels call the layer's hidden states.
const OWN: [(&str, &str); 1] = [("x", "hidden")];

/// Slots, and their rows of `h`.
pub(super) type Stretch = (Range<u32>, Tensor);

/// A plan, and the experts that the weights hold: what the stretches below have in common.
pub(super) struct Planned<'a> {
    pub(super) shape: &'a PlanShape,
    pub(super) plan: Slice<'a>,
    /// `[experts]` u32: which of `weights`' experts holds each of the plan's
    /// ([`grouped_matmul::Args::places`]).
    pub(super) places: Option<Slice<'a>>,
}

impl Experts {
    pub(super) fn new(
        ctx: &Context,
        activation: Activation,
        weights: ExpertWeights,
    ) -> Result<Self> {
        let shape = weights.shape();
        let kernels = Kernels {
            gate_up: GroupedMatmul::new(ctx, &shape, Stage::GateUp(activation))?,
            down: GroupedMatmul::new(ctx, &shape, Stage::Down)?,
            combine: Combine::new(ctx)?,
            gather: Gather::new(ctx)?,
        };
        Ok(Self { ctx: ctx.clone(), weights, kernels: Arc::new(kernels) })
    }

    /// The slices that a batch is read from and written to, checked.
    pub(super) fn in_out<'a>(&self, batch: &Batch<'a>) -> Result<InOut<'a>> {
        let Batch { hidden, out, tokens, add, .. } = *batch;
        let out = out.ok_or_else(|| Error::invalid("out", "missing: `Batch::into_out`"))?;
        let (rows, width) = (tokens.into(), self.weights.shape().hidden.into());
        hidden.holds("hidden", rows, width)?;
        out.holds("out", rows, width)?;
        if hidden.slice.overlaps(&out.slice) {
            return Err(Error::Overlap { written: "out", other: "hidden" });
        }
        Ok(InOut { hidden, out, add })
    }

    /// Adds the experts and the combination to bound work that ends with its plan.
    pub(super) fn extend(
        &self,
        bound: &mut BoundLayer,
        in_out: InOut<'_>,
        scratch: &Scratch,
    ) -> Result<()> {
        let Some((shape, plan)) = bound.plan() else { return Ok(()) };
        let ExpertSteps { gate_up, down } = self.bind((&shape, plan), in_out, scratch, None)?;
        bound.extend(gate_up);
        for (matmuls, combine) in down {
            bound.extend(matmuls);
            bound.extend(combine);
        }
        Ok(())
    }

    /// What follows a plan: `h` in stretches of slots, `y` in stretches of columns, each within a
    /// binding.
    ///
    /// With `places`, the weights hold only some experts at a time, and each stretch of `y` keeps
    /// its own buffer, so that they can be computed expert by expert before any is combined.
    pub(super) fn bind(
        &self,
        (shape, plan): (&PlanShape, Slice<'_>),
        in_out: InOut<'_>,
        scratch: &Scratch,
        places: Option<Slice<'_>>,
    ) -> Result<ExpertSteps> {
        let planned = Planned { shape, plan, places };
        let (gate_up, stretches) = self.bind_gate_up(&planned, in_out.hidden, scratch)?;
        let down = self.bind_down(&planned, &stretches, in_out, scratch)?;
        Ok(ExpertSteps { gate_up, down })
    }

    /// The first matmul, and the slots of each stretch of `h`.
    fn bind_gate_up(
        &self,
        planned: &Planned<'_>,
        x: Floats<'_>,
        scratch: &Scratch,
    ) -> Result<(Vec<BoundOp>, Vec<Stretch>)> {
        let &Planned { shape, plan, places } = planned;
        let [intermediate, hidden] = self.weights.shape().gate_up_matrix();
        let slots = shape.slots()?;
        let x_windows = windows(&self.ctx, "hidden", x.float_type, [shape.tokens, hidden])?;
        // Where `hidden` does not fit a binding, the rows of each stretch's slots are copied
        // together, window by window.
        let gathered = x_windows.len() > 1;
        let of_x = if gathered { x.float_type.bytes() * u64::from(hidden) } else { 0 };
        let most = self.ctx.max_binding() / of_x.max(4 * u64::from(intermediate));
        let most_rows = most.clamp(1, slots.into()) as u32;
        let values = |rows: u32, width: u32| u64::from(rows) * u64::from(width);
        let x_rows = if gathered {
            Some(scratch.get("x", x.float_type.bytes() * values(most_rows, hidden))?)
        } else {
            None
        };
        let mut parts = vec![];
        let mut stretches = vec![];
        for (i, rows) in chunks(slots, most_rows).into_iter().enumerate() {
            let h = scratch.part("h", i, 4 * values(rows.end - rows.start, intermediate))?;
            let mut from = Rows::Tokens(x);
            if let Some(x_rows) = &x_rows {
                for window in &x_windows {
                    let args = WindowArgs {
                        x: x.rows(window, hidden),
                        tokens: window.clone(),
                        plan,
                        slots: rows.clone(),
                        out: x_rows.slice(),
                        hidden,
                    };
                    let rows = self.kernels.gather.bind_window(shape, args);
                    parts.push(rows.map_err(|e| e.renamed(&OWN))?);
                }
                let gathered = Floats::new(x_rows, x.float_type);
                from = Rows::Slots(SlotRows { rows: gathered, first: rows.start });
            }
            let args = grouped_matmul::Args {
                x: from,
                plan,
                weights: &self.weights,
                places,
                out: SlotRows { rows: (&h).into(), first: rows.start },
                slots: rows.clone(),
                columns: 0..intermediate,
            };
            let matmul = self.kernels.gate_up.bind(shape, args);
            parts.push(matmul.map_err(|e| e.renamed(&OWN))?);
            stretches.push((rows, h));
        }
        Ok((parts, stretches))
    }

    /// The second matmul and the combination of each stretch of columns.
    pub(super) fn bind_down(
        &self,
        planned: &Planned<'_>,
        stretches: &[Stretch],
        in_out: InOut<'_>,
        scratch: &Scratch,
    ) -> Result<Vec<(Vec<BoundOp>, Vec<BoundOp>)>> {
        let &Planned { shape, plan, places } = planned;
        let hidden = self.weights.shape().hidden;
        let out_windows = windows(&self.ctx, "out", in_out.out.float_type, [shape.tokens, hidden])?;
        let mut down = vec![];
        for (i, columns) in self.column_stretches(shape)?.into_iter().enumerate() {
            let width = u64::from(columns.end - columns.start);
            let bytes = u64::from(shape.slots()?) * width * 4;
            let y = scratch.part("y", if places.is_some() { i } else { 0 }, bytes)?;
            let mut matmuls = vec![];
            for (rows, h) in stretches {
                let args = grouped_matmul::Args {
                    x: Rows::Slots(SlotRows { rows: h.into(), first: rows.start }),
                    plan,
                    weights: &self.weights,
                    places,
                    out: (&y).into(),
                    slots: rows.clone(),
                    columns: columns.clone(),
                };
                matmuls.push(self.kernels.down.bind(shape, args)?);
            }
            let mut combine = vec![];
            for window in &out_windows {
                let args = combine::Args {
                    y: y.slice(),
                    plan,
                    out: in_out.out.rows(window, hidden),
                    columns: columns.clone(),
                    hidden,
                    add: in_out.add,
                };
                combine.push(self.kernels.combine.bind_tokens(shape, window.clone(), args)?);
            }
            down.push((matmuls, combine));
        }
        Ok(down)
    }

    /// Columns of `y`, all slots of which fit a binding.
    fn column_stretches(&self, shape: &PlanShape) -> Result<Vec<Range<u32>>> {
        let (have, slots) = (self.ctx.max_binding(), u64::from(shape.slots()?));
        let hidden = self.weights.shape().hidden;
        let most = (have / 4 / slots).min(u64::from(hidden).next_multiple_of(PANEL.into())) as u32;
        let most = most / PANEL * PANEL;
        if most == 0 {
            let need = slots * 4 * u64::from(PANEL);
            let limit = "max_storage_buffer_binding_size";
            return Err(Error::Limit { name: "tokens", limit, need, have });
        }
        Ok(chunks(hidden, most))
    }
}

/// Rows `[rows, width]` in stretches that each fit a binding and start where one may start; one
/// of all where they fit.
pub(super) fn windows(
    ctx: &Context,
    name: &'static str,
    float_type: FloatType,
    [rows, width]: [u32; 2],
) -> Result<Vec<Range<u32>>> {
    let (have, row) = (ctx.max_binding(), u64::from(width) * float_type.bytes());
    if u64::from(rows) * row <= have {
        return Ok(chunks(rows, rows.max(1)));
    }
    // A power of two, so that the rows from one aligned start to the next are one, too.
    let alignment = u64::from(ctx.limits().min_storage_buffer_offset_alignment);
    let apart = (alignment >> row.trailing_zeros()).max(1);
    let most = have / row / apart * apart;
    if most == 0 {
        let limit = "max_storage_buffer_binding_size";
        return Err(Error::Limit { name, limit, need: apart * row, have });
    }
    Ok(chunks(rows, most as u32)) // fewer than `rows`
}

/// `0..n` in stretches of at most `step`.
fn chunks(n: u32, step: u32) -> Vec<Range<u32>> {
    (0..n).step_by(step as usize).map(|i| i..i.saturating_add(step).min(n)).collect()
}
