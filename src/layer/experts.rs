//! What follows a plan: the experts' two matmuls, and the combination into the output.
use super::batch::Batch;
use super::bound::BoundLayer;
use super::cut::{Cut, Sizes};
use super::scratch::Scratch;
use crate::device::{Tensor, both};
use crate::ops::combine::{self, Combine, Sums};
use crate::ops::gather::{Gather, WindowArgs};
use crate::ops::grouped_matmul::{self, GroupedMatmul, Rows, SlotRows, Stage};
use crate::routing::Activation;
use crate::weights::ExpertWeights;
use crate::{BoundOp, Context, Error, FloatType, Floats, PlanShape, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// The experts of a layer, with their kernels.
#[derive(Clone, Debug)]
pub(super) struct Experts {
    pub(super) ctx: Context,
    pub(super) weights: ExpertWeights,
    pub(super) activation: Activation,
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
    /// Tokens whose rows of `out` are written; all where absent.
    pub(super) active: Option<Slice<'a>>,
    /// Most bytes of scratch.
    pub(super) limit: Option<u64>,
}

/// The dispatches that follow a plan.
pub(super) struct ExpertSteps {
    pub(super) gate_up: Vec<BoundOp>,
    /// The second matmul of each stretch of columns, and what combines it into `out`.
    pub(super) down: Vec<(Vec<BoundOp>, Vec<BoundOp>)>,
    /// Where `y` lies: its columns in each stretch.
    pub(super) y: Vec<(Range<u32>, Tensor)>,
}

/// What the kernels call the layer's hidden states.
const OWN: [(&str, &str); 1] = [("x", "hidden")];

/// Slots, and their rows of `h`.
type Stretch = (Range<u32>, Tensor);

/// A plan, and the experts that the weights hold: what the stretches below have in common.
#[derive(Clone, Copy)]
struct Planned<'a> {
    shape: &'a PlanShape,
    plan: Slice<'a>,
    /// `[experts]` u32: which of `weights`' experts holds each of the plan's
    /// ([`grouped_matmul::Args::places`]).
    places: Option<Slice<'a>>,
}

impl Experts {
    pub(super) fn new(
        ctx: &Context,
        activation: Activation,
        weights: ExpertWeights,
    ) -> Result<Self> {
        let shape = weights.shape();
        let (matmuls, others) = both(
            || {
                both(
                    || GroupedMatmul::new(ctx, &shape, Stage::GateUp(activation)),
                    || GroupedMatmul::new(ctx, &shape, Stage::Down),
                )
            },
            || (Combine::new(ctx), Gather::new(ctx)),
        );
        let kernels = Kernels {
            gate_up: matmuls.0?,
            down: matmuls.1?,
            combine: others.0?,
            gather: others.1?,
        };
        Ok(Self { ctx: ctx.clone(), weights, activation, kernels: Arc::new(kernels) })
    }

    /// The slices that a batch is read from and written to, checked.
    pub(super) fn in_out<'a>(&self, batch: &Batch<'a>) -> Result<InOut<'a>> {
        let Batch { hidden, out, tokens, add, active, .. } = *batch;
        let out = out.ok_or_else(|| Error::invalid("out", "missing: `Batch::into_out`"))?;
        let (rows, width) = (tokens.into(), self.weights.shape().hidden.into());
        hidden.holds("hidden", rows, width)?;
        out.holds("out", rows, width)?;
        batch.check_overlaps()?;
        Ok(InOut { hidden, out, add, active, limit: batch.scratch_limit })
    }

    /// Adds the experts and the combination to bound work that ends with its plan.
    pub(super) fn extend(
        &self,
        bound: &mut BoundLayer,
        in_out: InOut<'_>,
        scratch: &Scratch,
    ) -> Result<()> {
        let Some((shape, plan)) = bound.plan() else { return Ok(()) };
        let planned = Planned { shape: &shape, plan, places: None };
        let work = self.work(planned, in_out, scratch)?;
        if work.cut.in_turn {
            bound.extend(work.bind_in_turn()?);
            return Ok(());
        }
        let ExpertSteps { gate_up, down, .. } = work.bind()?;
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
        self.work(Planned { shape, plan, places }, in_out, scratch)?.bind()
    }

    /// How the work is cut.
    fn work<'a>(
        &'a self,
        planned: Planned<'a>,
        in_out: InOut<'a>,
        scratch: &'a Scratch,
    ) -> Result<Work<'a>> {
        let shape = planned.shape;
        let [intermediate, hidden] = self.weights.shape().gate_up_matrix();
        let InOut { hidden: x, out, add, limit, .. } = in_out;
        let x_windows = windows(&self.ctx, "hidden", x.float_type, [shape.tokens, hidden])?;
        let gathers = x_windows.len() > 1;
        let sizes = Sizes {
            tokens: shape.tokens,
            slots: shape.slots()?,
            hidden,
            intermediate,
            gathered: if gathers { x.float_type.bytes() * u64::from(hidden) } else { 0 },
            sums: add || out.float_type != FloatType::F32,
            binding: self.ctx.max_binding(),
        };
        let cut = sizes.cut(limit, scratch.asked())?;
        Ok(Work { of: self, planned, in_out, scratch, sizes, cut, x_windows })
    }
}

/// The work that follows a plan, and how it is cut.
struct Work<'a> {
    of: &'a Experts,
    planned: Planned<'a>,
    in_out: InOut<'a>,
    scratch: &'a Scratch,
    sizes: Sizes,
    cut: Cut,
    /// Stretches of `hidden` that each fit a binding. Where these are several, the rows of each stretch's
    /// slots are copied together, window by window.
    x_windows: Vec<Range<u32>>,
}

impl Work<'_> {
    fn f32s(&self, name: &'static str, part: usize, rows: u32, width: u32) -> Result<Tensor> {
        self.scratch.part(name, part, 4 * u64::from(rows) * u64::from(width))
    }

    /// `h` as a whole, in stretches that each fit a binding, and `y` in stretches of columns.
    fn bind(&self) -> Result<ExpertSteps> {
        let Sizes { slots, intermediate, hidden, tokens, .. } = self.sizes;
        let mut gate_up = vec![];
        let mut stretches: Vec<Stretch> = vec![];
        for (i, rows) in chunks(slots, self.cut.slots).into_iter().enumerate() {
            let h = self.f32s("h", i, rows.end - rows.start, intermediate)?;
            gate_up.extend(self.gate_up(&rows, &h)?);
            stretches.push((rows, h));
        }
        let Floats { float_type, .. } = self.in_out.out;
        let out_windows = windows(&self.of.ctx, "out", float_type, [tokens, hidden])?;
        let (mut down, mut all_y) = (vec![], vec![]);
        for (i, columns) in chunks(hidden, self.cut.columns).into_iter().enumerate() {
            let part = if self.planned.places.is_some() { i } else { 0 };
            let y = self.f32s("y", part, slots, columns.end - columns.start)?;
            let mut matmuls = vec![];
            for (rows, h) in &stretches {
                matmuls.push(self.down(rows, h, &columns, (&y).into())?);
            }
            let mut combine = vec![];
            for window in &out_windows {
                let sums = Sums::Slots { slots: 0..slots, continued: false };
                let out = self.in_out.out.rows(window, hidden);
                combine.push(self.combine((&y, sums), &columns, (window, out), self.in_out.add)?);
            }
            down.push((matmuls, combine));
            all_y.push((columns, y));
        }
        Ok(ExpertSteps { gate_up, down, y: all_y })
    }

    /// Stretches of slots in turn: each is combined before the next one takes its place. A token's sum goes
    /// from one to the next in f32, in the order of its slots, so it has the bits that it has at once.
    fn bind_in_turn(&self) -> Result<Vec<BoundOp>> {
        let Sizes { slots, intermediate, hidden, tokens, sums, .. } = self.sizes;
        let InOut { out, add, .. } = self.in_out;
        let windows = windows_within(&self.of.ctx, "out", out.float_type, [tokens, hidden])?;
        let mut places: Vec<(Range<u32>, Option<Tensor>)> = vec![];
        for (i, window) in windows.into_iter().enumerate() {
            let own = |window: &Range<u32>| self.f32s("sums", i, window.end - window.start, hidden);
            let own = if sums { Some(own(&window)?) } else { None };
            places.push((window, own));
        }
        let all = 0..hidden;
        let mut parts = vec![];
        for rows in chunks(slots, self.cut.slots) {
            let count = rows.end - rows.start;
            let h = self.f32s("h", 0, count, intermediate)?;
            let y = self.f32s("y", 0, count, hidden)?;
            parts.extend(self.gate_up(&rows, &h)?);
            let of_rows = SlotRows { rows: (&y).into(), first: rows.start };
            parts.push(self.down(&rows, &h, &all, of_rows)?);
            for (window, own) in &places {
                let sums = Sums::Slots { slots: rows.clone(), continued: rows.start > 0 };
                let place = match own {
                    Some(own) => own.into(),
                    None => out.rows(window, hidden),
                };
                parts.push(self.combine((&y, sums), &all, (window, place), false)?);
            }
        }
        for (window, own) in &places {
            if let Some(own) = own {
                let to = (window, out.rows(window, hidden));
                parts.push(self.combine((own, Sums::Ready), &all, to, add)?);
            }
        }
        Ok(parts)
    }

    /// The first matmul of some slots, with the rows that it reads.
    fn gate_up(&self, rows: &Range<u32>, h: &Tensor) -> Result<Vec<BoundOp>> {
        let Planned { shape, plan, places } = self.planned;
        let (x, kernels) = (self.in_out.hidden, &self.of.kernels);
        let Sizes { hidden, intermediate, gathered, .. } = self.sizes;
        let mut parts = vec![];
        let x_rows;
        let mut from = Rows::Tokens(x);
        if gathered > 0 {
            x_rows = self.scratch.get("x", gathered * u64::from(self.cut.slots))?;
            for window in &self.x_windows {
                let args = WindowArgs {
                    x: x.rows(window, hidden),
                    tokens: window.clone(),
                    plan,
                    slots: rows.clone(),
                    out: x_rows.slice(),
                    hidden,
                };
                let copied = kernels.gather.bind_window(shape, args);
                parts.push(copied.map_err(|e| e.renamed(&OWN))?);
            }
            let copied = Floats::new(&x_rows, x.float_type);
            from = Rows::Slots(SlotRows { rows: copied, first: rows.start });
        }
        let args = grouped_matmul::Args {
            x: from,
            plan,
            weights: &self.of.weights,
            places,
            out: SlotRows { rows: h.into(), first: rows.start },
            slots: rows.clone(),
            columns: 0..intermediate,
        };
        let matmul = kernels.gate_up.bind(shape, args);
        parts.push(matmul.map_err(|e| e.renamed(&OWN))?);
        Ok(parts)
    }

    /// The second matmul of some slots, and of some columns of `y`.
    fn down(
        &self,
        rows: &Range<u32>,
        h: &Tensor,
        columns: &Range<u32>,
        y: SlotRows<'_>,
    ) -> Result<BoundOp> {
        let Planned { shape, plan, places } = self.planned;
        let args = grouped_matmul::Args {
            x: Rows::Slots(SlotRows { rows: h.into(), first: rows.start }),
            plan,
            weights: &self.of.weights,
            places,
            out: y,
            slots: rows.clone(),
            columns: columns.clone(),
        };
        self.of.kernels.down.bind(shape, args)
    }

    /// What `y` holds, combined into rows of some tokens.
    fn combine(
        &self,
        (y, sums): (&Tensor, Sums),
        columns: &Range<u32>,
        (window, out): (&Range<u32>, Floats<'_>),
        add: bool,
    ) -> Result<BoundOp> {
        let Planned { shape, plan, .. } = self.planned;
        let hidden = self.sizes.hidden;
        let args = combine::Args { y: y.slice(), plan, out, columns: columns.clone(), hidden, add };
        let active = self.in_out.active;
        let part = combine::Part { tokens: window.clone(), y: sums, active };
        self.of.kernels.combine.bind_part(shape, args, part)
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
    windows_of(ctx, name, float_type, float_type, [rows, width])
}

/// The same where rows of f32 as many are to fit, too.
fn windows_within(
    ctx: &Context,
    name: &'static str,
    float_type: FloatType,
    [rows, width]: [u32; 2],
) -> Result<Vec<Range<u32>>> {
    windows_of(ctx, name, float_type, FloatType::F32, [rows, width])
}

/// Stretches that start where rows of one type may, and fit in the other.
fn windows_of(
    ctx: &Context,
    name: &'static str,
    starts: FloatType,
    fits: FloatType,
    [rows, width]: [u32; 2],
) -> Result<Vec<Range<u32>>> {
    let [start, row] = [starts, fits].map(|of| u64::from(width) * of.bytes());
    let have = ctx.max_binding();
    if u64::from(rows) * row <= have {
        return Ok(chunks(rows, rows.max(1)));
    }
    // A power of two, so that the rows from one aligned start to the next are one, too.
    let alignment = u64::from(ctx.limits().min_storage_buffer_offset_alignment);
    let apart = (alignment >> start.trailing_zeros()).max(1);
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
