//! The works that `cargo bench -p benches` calls W1, W2 and OP1 to OP3, in Burn's own tensor operations and in wgmoe, on the
//! same numbers and in turns: `cargo run --release --example works [PATTERN]`. Prints a table. Each result is checked first.
//!
//! Of several ways to write a work in Burn the fastest on a software driver is here. W1 as every expert on every token, or as
//! a chain of matmuls an expert, was slower. OP1b is a sort, which Burn does on the CPU: its top-k on the GPU loops longer than
//! Mesa 22.3's software driver allows.
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use std::time::{Duration, Instant};
use testkit::block_on;
use testkit::compare::{close, same};
use testkit::works::{
    GATE, INDEX, Matrix, OP2, Part, SCORES, TABLE, Work, X, choice, fill, gather, grouped_matmul,
    mix,
};
use wgmoe::layer::BoundLayer;
use wgmoe::ops::expert_choice;
use wgmoe::ops::grouped_matmul::cpu_row;
use wgmoe::plan::bits;
use wgmoe::weights::Projection;
use wgmoe::{BoundOp, Context, Gpu, WeightType};
use wgmoe_burn::MoeDevice;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What is timed of wgmoe.
enum Ours {
    BoundOp(BoundOp),
    Layer(Box<BoundLayer>),
}

/// One device, for both.
struct Both {
    gpu: Gpu,
    ctx: Context,
    burn: Device,
    pattern: String,
}

fn main() -> Outcome<()> {
    let device = MoeDevice::open()?;
    let ctx = device.context().clone();
    let gpu = Gpu {
        device: ctx.device().clone(),
        queue: device.queue().clone(),
        info: ctx.info().clone(),
    };
    println!("{}, {} {}\n", gpu.info.name, gpu.info.driver, gpu.info.driver_info);
    println!("| work | Burn, least | median | wgmoe, least | median | ratio of the least |");
    println!("|---|---|---|---|---|---|");
    let both = Both {
        ctx,
        gpu,
        burn: device.device().clone(),
        pattern: std::env::args().nth(1).unwrap_or_default(),
    };
    both.layer("W1 f32", &Work::w1(), WeightType::F32, |experts, x| experts.token_choice(x, 8))?;
    both.layer("W2 f32", &Work::w2(512), WeightType::F32, |experts, x| experts.choose(x, 64))?;
    both.choice("OP1a", [512, 512, 32], |r, k| r.topk_with_indices(k, 0).1)?;
    both.choice("OP1b", [4096, 64, 256], |r, k| r.sort_descending_with_indices(0).1.slice([0..k]))?;
    both.grouped_matmul()?;
    both.gather()
}

impl Both {
    fn wanted(&self, name: &str) -> bool {
        name.contains(&self.pattern)
    }

    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), &self.burn)
    }

    fn indices(&self, values: Vec<i32>) -> Tensor<1, Int> {
        let n = values.len();
        Tensor::from_data(TensorData::new(values, [n]), &self.burn)
    }

    /// Runs both in turns, each once untimed and once timed, and prints a row.
    fn row<T>(&self, name: &str, burn: impl Fn() -> T, ours: &Ours) -> Outcome<()> {
        let timed = |f: &dyn Fn() -> Outcome<()>| {
            f()?;
            let start = Instant::now();
            f()?;
            Outcome::Ok(start.elapsed())
        };
        let theirs = || {
            let out = burn();
            self.burn.sync()?;
            drop(out);
            Ok(())
        };
        let own = || {
            let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
            match ours {
                Ours::BoundOp(step) => {
                    step.record(&mut encoder.begin_compute_pass(&Default::default()))
                }
                Ours::Layer(step) => step.encode(&mut encoder),
            }
            self.gpu.queue.submit([encoder.finish()]);
            Ok(self.gpu.wait()?)
        };
        let mut times = [vec![], vec![]];
        let start = Instant::now();
        while times[0].len() < 7 || (times[0].len() < 40 && start.elapsed().as_secs() < 5) {
            times[0].push(timed(&theirs)?);
            times[1].push(timed(&own)?);
        }
        times.iter_mut().for_each(|t| t.sort());
        let ms = |t: Duration| t.as_secs_f64() * 1e3;
        let [[a, b], [c, d]] = times.map(|t| [ms(t[0]), ms(t[t.len() / 2])]);
        println!("| {name} | {a:.2} ms | {b:.2} | {c:.2} ms | {d:.2} | {:.1} |", a / c);
        Ok(())
    }

    /// A layer, whose two outputs must agree.
    fn layer(
        &self,
        name: &str,
        work: &Work,
        weight_type: WeightType,
        run: impl Fn(&Experts<'_>, &Tensor<2>) -> Tensor<2>,
    ) -> Outcome<()> {
        if !self.wanted(name) {
            return Ok(());
        }
        let (gpu, s) = (&self.gpu, work.config);
        let [d, f, e] = [s.hidden, s.intermediate, s.experts].map(|n| n as usize);
        let layer = work.layer(&self.ctx, block_on(work.weights(gpu, &self.ctx, weight_type))?)?;
        let bound = work.bind(gpu, &layer, None)?;
        block_on(bound.run(gpu, &Part::ALL))?;
        let choice = block_on(work.check_choice(gpu, &bound))?;
        block_on(work.check_output(gpu, &layer, &bound, &choice, 8))?;

        // Burn multiplies by `[in, out]`.
        let all = |projection, rows: usize, columns: usize| {
            let one = |e| match work.expert(e, projection) {
                Matrix::Own(values) => transposed(&values, rows, columns),
                Matrix::Window(_) => unreachable!("W1 and W2 have numbers of their own"),
            };
            self.tensor((0..s.experts).flat_map(one).collect(), [e, columns, rows])
        };
        let experts = Experts {
            both: self,
            experts: e,
            router: self.tensor(transposed(work.router(), e, d), [d, e]),
            gate: all(Projection::Gate, f, d),
            up: all(Projection::Up, f, d),
            down: all(Projection::Down, d, f),
        };
        let x = self.tensor(work.x.clone(), [work.tokens as usize, d]);
        let theirs = run(&experts, &x).try_into_vec_as::<f32>()?;
        let own: Vec<f32> = gpu.download(&bound.out)?;
        let largest = own.iter().fold(0f32, |m, v| m.max(v.abs()));
        close(&theirs, &own, 1e-4 * largest, 0.0, name)?;
        self.row(name, || run(&experts, &x), &Ours::Layer(Box::new(bound.step)))
    }

    /// OP1: what each expert chose must sum to the same as the twin's.
    fn choice(
        &self,
        name: &str,
        shape: [u32; 3],
        run: impl Fn(Tensor<2>, usize) -> Tensor<2, Int>,
    ) -> Outcome<()> {
        let [t, e, k] = shape;
        let name = format!("{name}: top {k} of {t} tokens for {e} experts");
        if !self.wanted(&name) {
            return Ok(());
        }
        let step = choice(&self.gpu, &self.ctx, shape)?;
        let [t, e, k] = shape.map(|n| n as usize);
        let r = fill(SCORES, shape[0] * shape[1], 1.0);
        let scores = self.tensor(r.clone(), [t, e]);
        let chosen = run(scores.clone(), k).try_into_vec_as::<i64>()?;
        let twin = expert_choice::cpu(&r, e, &[0, shape[0]], None, &[shape[2]]);
        for expert in 0..e {
            let mut own: Vec<usize> = (0..k).map(|i| chosen[i * e + expert] as usize).collect();
            own.retain(|&token| token < t);
            own.sort_unstable();
            own.dedup();
            let sum =
                |tokens: &[usize]| tokens.iter().map(|t| f64::from(r[t * e + expert])).sum::<f64>();
            // Among equals Burn may choose others.
            let error = (sum(&own) - sum(&bits::tokens_of(&twin, t, expert))).abs();
            if own.len() != k || error > 1e-6 {
                return Err(format!("{name}: Burn's choice of expert {expert} is wrong").into());
            }
        }
        self.row(&name, || run(scores.clone(), k), &Ours::BoundOp(step))
    }

    fn grouped_matmul(&self) -> Outcome<()> {
        let [e, rows, k, n] = OP2.map(|n| n as usize);
        let name = format!("OP2: {e} x [{rows}, {k}] x [{k}, {n}], f32");
        if !self.wanted(&name) {
            return Ok(());
        }
        let step = grouped_matmul(&self.gpu, &self.ctx, WeightType::F32, OP2)?;
        let x = fill(X, (e * rows * k) as u32, 1.0);
        let w = fill(GATE, (e * n * k) as u32, 1.0);
        let in_out = w.chunks_exact(n * k).flat_map(|w| transposed(w, n, k)).collect();
        let (left, right) = (self.tensor(x.clone(), [e, rows, k]), self.tensor(in_out, [e, k, n]));
        let got = left.clone().matmul(right.clone()).try_into_vec_as::<f32>()?;
        for slot in (0..e * rows).step_by(131) {
            let weight = |i: usize| w[slot / rows * n * k + i];
            let want: Vec<f32> =
                cpu_row(&x[slot * k..][..k], &weight, n).into_iter().map(|v| v as f32).collect();
            close(&got[slot * n..][..n], &want, 1e-3, 1e-5, &format!("Burn, slot {slot}"))?;
        }
        self.row(&name, || left.clone().matmul(right.clone()), &Ours::BoundOp(step))
    }

    fn gather(&self) -> Outcome<()> {
        let (rows, d) = (4096u32, 2048u32);
        let name = format!("OP3: gather {rows} rows of {d}");
        if !self.wanted(&name) {
            return Ok(());
        }
        let x = fill(TABLE, rows * d, 1.0);
        let token_of: Vec<u32> = (0..rows).map(|i| mix(INDEX, i) % rows).collect();
        let x_in = self.gpu.upload(&x);
        let step = block_on(gather(&self.gpu, &self.ctx, (&x_in, &x), d, &token_of))?;
        let table = self.tensor(x.clone(), [rows as usize, d as usize]);
        let index = self.indices(token_of.iter().map(|&t| t as i32).collect());
        let got = table.clone().select(0, index.clone()).try_into_vec_as::<f32>()?;
        same(&got, &wgmoe::ops::gather::cpu(&x, d as usize, &token_of), "Burn's rows")?;
        self.row(&name, || table.clone().select(0, index.clone()), &Ours::BoundOp(step))
    }
}

/// A layer in Burn's operations: batched matmuls over all experts.
struct Experts<'a> {
    both: &'a Both,
    experts: usize,
    /// `[D, E]`.
    router: Tensor<2>,
    /// `[E, D, F]`.
    gate: Tensor<3>,
    up: Tensor<3>,
    /// `[E, F, D]`.
    down: Tensor<3>,
}

impl Experts<'_> {
    /// The experts on their rows, `rows` for each, added up by token with their gates.
    fn apply(&self, x: &Tensor<2>, token_of: Tensor<1, Int>, gates: Tensor<2>) -> Tensor<2> {
        let [tokens, d] = x.dims();
        let rows = token_of.dims()[0] / self.experts;
        let own = x.clone().select(0, token_of.clone()).reshape([self.experts, rows, d]);
        let h = silu(own.clone().matmul(self.gate.clone())) * own.matmul(self.up.clone());
        let y = h.matmul(self.down.clone()).reshape([self.experts * rows, d]) * gates;
        let out = Tensor::<2>::zeros([tokens, d], &self.both.burn);
        out.select_assign(0, token_of, y, IndexingUpdateOp::Add)
    }

    /// Token choice: the choice is read back, and each expert's rows are padded to the fullest one's.
    fn token_choice(&self, x: &Tensor<2>, top: usize) -> Tensor<2> {
        let scores = softmax(x.clone().matmul(self.router.clone()), 1);
        let (gates, experts) = scores.topk_with_indices(top, 1);
        let gates = gates.clone() / gates.sum_dim(1);
        let experts = experts.try_into_vec_as::<i64>().expect("read back");
        let gates = gates.try_into_vec_as::<f32>().expect("read back");
        let mut lists = vec![vec![]; self.experts];
        for (i, (&e, &gate)) in experts.iter().zip(&gates).enumerate() {
            lists[e as usize].push(((i / top) as i32, gate));
        }
        let rows = lists.iter().map(Vec::len).max().unwrap_or(0).next_multiple_of(4);
        // Padding is token 0 with a gate of 0.
        lists.iter_mut().for_each(|list| list.resize(rows, (0, 0.0)));
        let (token_of, gates): (Vec<i32>, Vec<f32>) = lists.into_iter().flatten().unzip();
        let gates = self.both.tensor(gates, [self.experts * rows, 1]);
        self.apply(x, self.both.indices(token_of), gates)
    }

    /// Expert choice, without a readback.
    fn choose(&self, x: &Tensor<2>, capacity: usize) -> Tensor<2> {
        let scores = softmax(x.clone().matmul(self.router.clone()), 1);
        let (gates, tokens) = scores.topk_with_indices(capacity, 0);
        let slots = self.experts * capacity;
        self.apply(x, tokens.transpose().reshape([slots]), gates.transpose().reshape([slots, 1]))
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}
