//! The same layer in Burn's own tensor operations, to compare with, forward and backward.
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

    /// The same weights as leaves of Burn's autodiff, which keeps their gradients.
    #[must_use]
    pub fn learning(self) -> Self {
        let Self { router, gate, up, down, top } = self;
        let [gate, up, down] = [gate, up, down].map(|t| t.autodiff().require_grad());
        Self { router: router.autodiff().require_grad(), gate, up, down, top }
    }

    /// Gates of the experts chosen, and these, `[T, top]` each.
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

    /// Every expert on every token, weighed by gates `[T, E]` and, where it is shared, by 1.
    fn all(&self, x: Tensor<2>, gates: Tensor<2>) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let [all, routed] = [self.gate.dims()[0], gates.dims()[1]];
        let shared = Tensor::<2>::ones([tokens, all - routed], &gates.device());
        let gates = Tensor::cat(vec![gates, shared], 1).transpose().unsqueeze_dim::<3>(2);
        (self.experts(x.unsqueeze_dim::<3>(0)) * gates).sum_dim(0).reshape([tokens, width])
    }

    /// Every expert on every token, weighed with 0 where it was not chosen: no readback.
    pub fn dense(&self, x: Tensor<2>) -> Tensor<2> {
        let (gates, ids) = self.choose(&x);
        let none = Tensor::<2>::zeros([x.dims()[0], self.router.dims()[1]], &gates.device());
        let gates = none.scatter(1, ids, gates, IndexingUpdateOp::Add);
        self.all(x, gates)
    }

    /// As [`Reference::dense`], each expert choosing the `capacity` tokens that it scores highest; a token's gates are a
    /// softmax over the experts that took it.
    pub fn expert_choice(&self, x: Tensor<2>, capacity: usize) -> Tensor<2> {
        let logits = x.clone().matmul(self.router.clone());
        // What is chosen is a constant.
        let fixed = logits.clone().inner();
        let (_, ids) = fixed.clone().topk_with_indices(capacity, 0);
        let ones = Tensor::<2>::ones(ids.dims(), &fixed.device());
        let taken = fixed.zeros_like().scatter(0, ids, ones, IndexingUpdateOp::Add);
        let untaken = taken.clone().sum_dim(1).equal_elem(0).float();
        let powers = (logits - fixed.max_dim(1)).exp() * taken;
        let gates = powers.clone() / (powers.sum_dim(1) + untaken);
        self.all(x, gates)
    }

    /// Each expert on its own tokens: the choice is read back.
    pub fn scale_by_expert(&self, x: Tensor<2>) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let (all, routed) = (self.gate.dims()[0], self.router.dims()[1]);
        let (gates, ids) = self.choose(&x);
        let ids = ids.try_into_vec_as::<i64>().expect("a tensor that can be read");
        let gates = gates.reshape([tokens * self.top]);
        // Of each expert the places among the gates; a token's are `top` in a row.
        let mut places = vec![vec![]; routed];
        for (i, &e) in (0..).zip(&ids) {
            places[e as usize].push(i);
        }
        let device = x.device();
        let indices = |list: Vec<i32>| Tensor::<1, Int>::from_data(list.as_slice(), &device);
        let mut out = Tensor::<2>::zeros([tokens, width], &device);
        for e in 0..all {
            let one = Self {
                router: self.router.clone(),
                gate: self.gate.clone().slice([e..e + 1]),
                up: self.up.clone().slice([e..e + 1]),
                down: self.down.clone().slice([e..e + 1]),
                top: self.top,
            };
            let Some(places) = places.get(e) else {
                // Shared: all tokens, as they are.
                out = out + one.experts(x.clone().unsqueeze_dim(0)).reshape([tokens, width]);
                continue;
            };
            let rows = places.len();
            if rows == 0 {
                continue;
            }
            let list = indices(places.iter().map(|i| i / self.top as i32).collect());
            let gates = gates.clone().select(0, indices(places.clone())).reshape([rows, 1]);
            let rows_of = x.clone().select(0, list.clone()).unsqueeze_dim::<3>(0);
            let y = one.experts(rows_of).reshape([rows, width]) * gates;
            out = out.select_assign(0, list, y, IndexingUpdateOp::Add);
        }
        out
    }
}
