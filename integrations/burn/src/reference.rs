//! The same layer in Burn's own tensor operations, to compare with.
use crate::MoeTensors;
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

/// Token choice with softmax scores, the gates of a token normalised over its `top` experts; experts past the router's rows are
/// shared. `down (silu (gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct Reference {
    /// `[D, E]`, and the experts' matrices as `[X, in, out]`.
    router: Tensor<2>,
    gate: Tensor<3>,
    up: Tensor<3>,
    down: Tensor<3>,
    top: usize,
}

impl Reference {
    /// Takes the weights, transposed.
    pub fn new(tensors: MoeTensors, top: usize) -> Self {
        let turned = |t: Tensor<3>| t.swap_dims(1, 2) * 1.0; // laid out anew, so that each product reads rows
        Self {
            router: tensors.router.transpose() * 1.0,
            gate: turned(tensors.gate),
            up: turned(tensors.up),
            down: turned(tensors.down),
            top,
        }
    }

    fn choose(&self, x: &Tensor<2>) -> (Tensor<2>, Tensor<2, Int>) {
        let scores = softmax(x.clone().matmul(self.router.clone()), 1);
        let (gates, ids) = scores.topk_with_indices(self.top, 1);
        (gates.clone() / gates.sum_dim(1), ids)
    }

    /// `[X, R, D]` or `[1, R, D]` to `[X, R, D]`.
    fn experts(&self, x: Tensor<3>) -> Tensor<3> {
        let h = silu(x.clone().matmul(self.gate.clone())) * x.matmul(self.up.clone());
        h.matmul(self.down.clone())
    }

    /// Every expert on every token, weighed with 0 where it was not chosen: no readback.
    pub fn dense(&self, x: Tensor<2>) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let (all, routed) = (self.gate.dims()[0], self.router.dims()[1]);
        let (gates, ids) = self.choose(&x);
        let none = Tensor::<2>::zeros([tokens, routed], &x.device());
        let weights = none.scatter(1, ids, gates, IndexingUpdateOp::Add);
        let shared = Tensor::<2>::ones([tokens, all - routed], &x.device());
        let weights = Tensor::cat(vec![weights, shared], 1).transpose().unsqueeze_dim::<3>(2);
        (self.experts(x.unsqueeze_dim::<3>(0)) * weights).sum_dim(0).reshape([tokens, width])
    }

    /// Each expert on its own tokens: the choice is read back.
    pub fn scale_by_expert(&self, x: Tensor<2>) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let (all, routed) = (self.gate.dims()[0], self.router.dims()[1]);
        let (gates, ids) = self.choose(&x);
        let ids = ids.try_into_vec_as::<i64>().expect("a tensor that can be read");
        let gates = gates.try_into_vec_as::<f32>().expect("a tensor that can be read");
        let mut lists = vec![(vec![], vec![]); all];
        for (i, (&e, &gate)) in ids.iter().zip(&gates).enumerate() {
            lists[e as usize].0.push((i / self.top) as i32);
            lists[e as usize].1.push(gate);
        }
        for list in &mut lists[routed..] {
            *list = ((0..tokens as i32).collect(), vec![1.0; tokens]);
        }
        let mut out = Tensor::<2>::zeros([tokens, width], &x.device());
        for (e, (list, gates)) in lists.into_iter().enumerate().filter(|(_, l)| !l.0.is_empty()) {
            let rows = list.len();
            let list = Tensor::<1, Int>::from_data(list.as_slice(), &x.device());
            let gates = Tensor::<1>::from_data(gates.as_slice(), &x.device()).reshape([rows, 1]);
            let one = Self {
                router: self.router.clone(),
                gate: self.gate.clone().slice([e..e + 1]),
                up: self.up.clone().slice([e..e + 1]),
                down: self.down.clone().slice([e..e + 1]),
                top: self.top,
            };
            let rows_of = x.clone().select(0, list.clone()).unsqueeze_dim::<3>(0);
            let y = one.experts(rows_of).reshape([rows, width]) * gates;
            out = out.select_assign(0, list, y, IndexingUpdateOp::Add);
        }
        out
    }
}
