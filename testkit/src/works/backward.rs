//! The experts' matmuls forwards and backwards, through a plan in which each token has one expert, run
//! once and compared in some slots with the twins.
use super::numbers::{SCORES, X, fill, mix};
use super::plan::{Planned, plan};
use crate::compare::close;
use crate::layer::stored;
use wgmoe::ops::activation::{self, Activate};
use wgmoe::ops::activation_gradient::{self, ActivationGradient};
use wgmoe::ops::grouped_matmul::{self, GroupedMatmul, Rows, Stage, cpu_row};
use wgmoe::ops::matmul_transposed::{self, MatmulTransposed, Weights};
use wgmoe::ops::weight_gradient::{self, Of, WeightGradient, cpu_outer};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertGradients, ExpertShape, HostWeights, Projection};
use wgmoe::{Activation, BoundOp, Context, ExpertWeights, Gpu, WeightType, wgpu};

/// Experts, rows of each, hidden and intermediate size: as EC-DLM has them, and as LLaDA2 has.
pub const BACKWARDS: [(&str, [u32; 4]); 2] =
    [("32x[64,512] F384", [32, 64, 512, 384]), ("8x[64,2048] F512", [8, 64, 2048, 512])];

/// Steps of one pass forwards and back, each to be recorded again and again in any order.
pub struct Backward {
    /// `z`, `h` and `y`.
    pub forward: BoundOp,
    /// `h` and `y` of inference, which keeps no `z`.
    pub inference: BoundOp,
    /// `dA`; then, of it, `dz`, `hg` and the gates' gradients.
    pub to_activation: BoundOp,
    pub through_activation: BoundOp,
    /// The rows that go back to the tokens.
    pub to_input: BoundOp,
    /// Of down; of gate and up.
    pub down_weights: BoundOp,
    pub gate_up_weights: BoundOp,
}

impl Backward {
    /// The steps of the way back by their names, in order.
    pub fn parts(&self) -> [(&'static str, &BoundOp); 5] {
        [
            ("dA", &self.to_activation),
            ("dz, hg, dgate", &self.through_activation),
            ("dX", &self.to_input),
            ("dWdown", &self.down_weights),
            ("dWgate, dWup", &self.gate_up_weights),
        ]
    }
}

/// What lies on the device.
struct Buffers {
    x: wgpu::Buffer,
    dy: wgpu::Buffer,
    z: wgpu::Buffer,
    h: wgpu::Buffer,
    y: wgpu::Buffer,
    dz: wgpu::Buffer,
    hg: wgpu::Buffer,
    dgate: wgpu::Buffer,
    dx: wgpu::Buffer,
}

struct Setup<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    shape: ExpertShape,
    planned: Planned,
    weights: ExpertWeights,
    gradients: ExpertGradients,
    buffers: Buffers,
}

type Outcome<T> = Result<T, wgmoe::Error>;

impl Setup<'_> {
    fn matmul(&self, stage: Stage) -> Outcome<BoundOp> {
        let (b, slots) = (&self.buffers, self.planned.shape.slots()?);
        let (x, out, columns) = match stage {
            Stage::Down => (Rows::Slots((&b.h).into()), &b.y, self.shape.hidden),
            Stage::GateUp(_) => (Rows::Tokens((&b.x).into()), &b.h, self.shape.intermediate),
            _ => (Rows::Tokens((&b.x).into()), &b.z, self.shape.intermediate),
        };
        let args = grouped_matmul::Args {
            x,
            plan: (&self.planned.plan).into(),
            weights: &self.weights,
            places: None,
            out: out.into(),
            slots: 0..slots,
            columns: 0..columns,
        };
        GroupedMatmul::new(self.ctx, &self.shape, stage)?.bind(&self.planned.shape, args)
    }

    fn transposed(&self, stage: matmul_transposed::Stage) -> Outcome<BoundOp> {
        let (b, f) = (&self.buffers, self.shape.intermediate);
        let (g, out, out_stride) = match stage {
            matmul_transposed::Stage::Down => (&b.dy, &b.dz, 2 * f),
            matmul_transposed::Stage::GateUp => (&b.dz, &b.dx, self.shape.hidden),
        };
        let args = matmul_transposed::Args {
            g: g.into(),
            plan: (&self.planned.plan).into(),
            weights: Weights::Packed(&self.weights),
            places: None,
            out: out.into(),
            out_stride,
        };
        MatmulTransposed::new(self.ctx, &self.shape, stage)?.bind(&self.planned.shape, args)
    }

    fn weight_gradient(&self, of: Of<'_>) -> Outcome<BoundOp> {
        let (plan, out) = ((&self.planned.plan).into(), &self.gradients);
        let args = weight_gradient::Args { of, plan, out, add: false };
        WeightGradient::new(self.ctx, &self.shape)?.bind(&self.planned.shape, args)
    }

    fn steps(&self, by: Activation) -> Outcome<Backward> {
        let (b, f) = (&self.buffers, self.shape.intermediate);
        let (plan, shape) = ((&self.planned.plan).into(), &self.planned.shape);
        let args = activation::Args { z: (&b.z).into(), plan, h: (&b.h).into(), intermediate: f };
        let activate = Activate::new(self.ctx, by)?.bind(shape, args)?;
        let args = activation_gradient::Args {
            z: (&b.z).into(),
            plan,
            dz: (&b.dz).into(),
            hg: (&b.hg).into(),
            dgate: (&b.dgate).into(),
            intermediate: f,
        };
        let through_activation = ActivationGradient::new(self.ctx, by)?.bind(shape, args)?;
        let halves = self.matmul(Stage::Gate)?.then(self.matmul(Stage::Up)?);
        let fused = self.matmul(Stage::GateUp(by))?;
        Ok(Backward {
            forward: halves.then(activate).then(self.matmul(Stage::Down)?),
            inference: fused.then(self.matmul(Stage::Down)?),
            to_activation: self.transposed(matmul_transposed::Stage::Down)?,
            through_activation,
            to_input: self.transposed(matmul_transposed::Stage::GateUp)?,
            down_weights: self
                .weight_gradient(Of::Down { dy: (&b.dy).into(), hg: (&b.hg).into() })?,
            gate_up_weights: self
                .weight_gradient(Of::GateUp { dz: (&b.dz).into(), x: (&b.x).into() })?,
        })
    }
}

/// Makes the steps, runs them in order and compares.
pub fn backward(
    gpu: &Gpu,
    ctx: &Context,
    [experts, rows, hidden, intermediate]: [u32; 4],
    weight_type: WeightType,
) -> Result<Backward, String> {
    let say = |e: wgmoe::Error| e.to_string();
    let tokens = experts * rows;
    let mut assigned = bits::empty(tokens as usize, experts as usize);
    for t in 0..tokens as usize {
        bits::set(&mut assigned, tokens as usize, t / rows as usize, t);
    }
    let logits = fill(SCORES, tokens * experts, 1.0);
    let planned = plan(gpu, ctx, [tokens, experts], &logits, &assigned)?;
    let shape = ExpertShape::new(experts, hidden, intermediate, weight_type);
    let weights = ExpertWeights::new(ctx, shape).map_err(say)?;
    let mut host = vec![];
    for (e, p) in (0..experts).flat_map(|e| Projection::ALL.map(|p| (e, p))) {
        let values = fill(mix(3 * e, p as u32), hidden * intermediate, 0.1);
        weights.write(&gpu.queue, e, p, HostWeights::F32(&values)).map_err(say)?;
        host.push(stored(&values, shape.matrix(p)[1], weight_type));
    }
    let [x, dy] = [X, SCORES].map(|seed| fill(seed, tokens * hidden, 1.0));
    let poisoned = |width: u32| gpu.upload(&vec![f32::NAN; (tokens * width) as usize]);
    let buffers = Buffers {
        x: gpu.upload(&x),
        dy: gpu.upload(&dy),
        z: poisoned(2 * intermediate),
        h: poisoned(intermediate),
        y: poisoned(hidden),
        dz: poisoned(2 * intermediate),
        hg: poisoned(intermediate),
        dgate: poisoned(1),
        dx: poisoned(hidden),
    };
    let gradients = ExpertGradients::new(ctx, &shape).map_err(say)?;
    let setup = Setup { gpu, ctx, shape, planned, weights, gradients, buffers };
    let steps = setup.steps(Activation::Silu).map_err(say)?;
    gpu.run(&steps.inference).map_err(say)?;
    gpu.run(&steps.forward).map_err(say)?;
    for (_, step) in steps.parts() {
        gpu.run(step).map_err(say)?;
    }
    setup.compare(&host, [&x, &dy])?;
    Ok(steps)
}

impl Setup<'_> {
    /// Some slots, and of some experts some of each gradient.
    fn compare(&self, host: &[Vec<f32>], [x, dy]: [&[f32]; 2]) -> Result<(), String> {
        let [d, f] = [self.shape.hidden, self.shape.intermediate].map(|n| n as usize);
        let get = |buffer: &wgpu::Buffer| -> Result<Vec<f32>, String> {
            self.gpu.download(buffer).map_err(|e| e.to_string())
        };
        let b = &self.buffers;
        let [z, y, dz, hg, dx] = [get(&b.z)?, get(&b.y)?, get(&b.dz)?, get(&b.hg)?, get(&b.dx)?];
        let rows = self.planned.shape.tokens as usize / self.shape.experts as usize;
        for slot in (0..x.len() / d).step_by(131) {
            let e = slot / rows;
            let [gate, up, down] = [0, 1, 2].map(|p| &host[3 * e + p]);
            let row = |all: &[f32], width: usize| all[slot * width..][..width].to_vec();
            let (x, dy) = (row(x, d), row(dy, d));
            let near = |got: Vec<f32>, want: &[f32], what: &str| {
                let most = crate::compare::largest(want);
                close(&got, want, 1e-4 * most, 1e-4, &format!("{what} of slot {slot}"))
            };
            let halves = [gate, up].map(|w| cpu_row(&x, &|i| w[i], f)).concat();
            let halves: Vec<f32> = halves.into_iter().map(|v| v as f32).collect();
            near(row(&z, 2 * f), &halves, "z")?;
            let h = activation::cpu(&halves, f, Activation::Silu);
            let of_h: Vec<f32> = cpu_row(&h, &|i| down[i], d).iter().map(|v| *v as f32).collect();
            near(row(&y, d), &of_h, "y")?;
            let da = matmul_transposed::cpu_row(&dy, &|i| down[i], f);
            let da: Vec<f32> = da.into_iter().map(|v| v as f32).collect();
            let gates = &self.planned.host.gate_of[slot..=slot];
            let want = activation_gradient::cpu(&halves, gates, &da, Activation::Silu);
            near(row(&dz, 2 * f), &want.dz, "dz")?;
            near(row(&hg, f), &want.hg, "hg")?;
            let of = |half: &[f32], w: &[f32]| matmul_transposed::cpu_row(half, &|i| w[i], d);
            let both = of(&want.dz[..f], gate).into_iter().zip(of(&want.dz[f..], up));
            near(row(&dx, d), &both.map(|(a, b)| (a + b) as f32).collect::<Vec<_>>(), "dX")?;
        }
        for e in (0..self.shape.experts as usize).step_by(5) {
            let slots = || (e * rows..(e + 1) * rows).map(|s| [s, s]);
            // The first 24 rows of each matrix.
            let some = |all: &[f32], stride: usize, first: usize| -> Vec<f32> {
                all.chunks_exact(stride).flat_map(|row| row[first..first + 24].to_vec()).collect()
            };
            for (p, want) in Projection::ALL.into_iter().zip([
                cpu_outer(&some(&dz, 2 * f, 0), x, [24, d], slots()),
                cpu_outer(&some(&dz, 2 * f, f), x, [24, d], slots()),
                cpu_outer(&some(dy, d, 0), &hg, [24, f], slots()),
            ]) {
                let (_, slice) = self.gradients.slices(e as u32, p).next().ok_or("no page")?;
                let got: Vec<f32> = self.gpu.download(slice).map_err(|e| e.to_string())?;
                let most = crate::compare::largest(&want);
                let what = format!("gradient of {p:?} of expert {e}");
                close(&got[..want.len()], &want, 1e-4 * most, 1e-4, &what)?;
            }
        }
        Ok(())
    }
}
