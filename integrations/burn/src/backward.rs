//! What Burn's autodiff records of the layer, and how it goes back.
use crate::ffn::Layer;
use crate::learning::{Learning, Split, Tape, Wanted};
use crate::op::MoeOps;
use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

/// From the gradient of the output to those of hidden states, router, gate, up and down.
#[derive(Debug)]
struct Through;

impl<B: Backend + MoeOps> Backward<B, 5> for Through {
    /// Router, bias, gate, up and down as they were.
    type State = (Learning, Tape, [FloatTensor<B>; 5]);

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (learning, tape, [router, bias, gate, up, down]) = ops.state;
        let (dhidden, drouter, dgate, dup, ddown) =
            B::moe_backward(dout, router, bias, gate, up, down, learning, tape);
        let all = [dhidden, drouter, dgate, dup, ddown];
        for (parent, gradient) in ops.parents.into_iter().zip(all) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: Backend + MoeOps, C: CheckpointStrategy> MoeOps for Autodiff<B, C> {
    /// # Panics
    ///
    /// Always: no gradient would come back.
    fn moe_ffn(_hidden: FloatTensor<Self>, _layer: Layer) -> FloatTensor<Self> {
        panic!(
            "weights that do not learn have no gradients: use `MoeFfn::learning`, or `inner` tensors"
        );
    }

    fn moe_learning(
        hidden: FloatTensor<Self>,
        router: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        learning: Learning,
        split: Split,
        _tape: Option<Tape>,
    ) -> FloatTensor<Self> {
        let wanted = Wanted {
            router: router.is_tracked(),
            experts: [&gate, &up, &down].into_iter().any(|tensor| tensor.is_tracked()),
        };
        let nodes = [&hidden, &router, &gate, &up, &down].map(|tensor| tensor.node());
        let hidden = hidden.into_primitive();
        let weights = [router, bias, gate, up, down].map(|tensor| tensor.into_primitive());
        let run = |[router, bias, gate, up, down]: [FloatTensor<B>; 5], learning, tape| {
            B::moe_learning(hidden, router, bias, gate, up, down, learning, split, tape)
        };
        match Through.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let tape = Tape::new(&learning, wanted);
                let out = run(weights.clone(), learning.clone(), Some(tape.clone()));
                prep.finish((learning, tape, weights), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(run(weights, learning, None)),
        }
    }

    /// # Panics
    ///
    /// Always: gradients have no gradients here.
    fn moe_backward(
        _dout: FloatTensor<Self>,
        _router: FloatTensor<Self>,
        _bias: FloatTensor<Self>,
        _gate: FloatTensor<Self>,
        _up: FloatTensor<Self>,
        _down: FloatTensor<Self>,
        _learning: Learning,
        _tape: Tape,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        panic!("gradients have no gradients here");
    }
}
