//! A layer whose experts lie on several ranks.
use crate::batch::{Batch, Options};
use crate::bound::BoundParallel;
use crate::exchange::{Exchange, Staged};
use crate::owner::Owner;
use crate::route::Device;
use crate::split::Split;
use crate::{Error, Result, World};
use std::cell::RefCell;
use std::rc::Rc;
use wgmoe::device::MatrixReport;
use wgmoe::layer::{LayerConfig, MoeRouting, Router};
use wgmoe::ops::combine::Combine;
use wgmoe::ops::gather::Gather;
use wgmoe::ops::grouped_matmul::tile_rows;
use wgmoe::{Context, ExpertWeights, wgpu};

/// Changes with what ranks send each other.
const PROTOCOL: u32 = 1;

/// The weights that one rank holds.
#[derive(Clone, Debug, Default)]
pub struct RankWeights {
    /// Those of its experts, in their order; none where it has none.
    pub experts: Option<ExpertWeights>,
    /// Those of the shared experts, which every rank holds; none where the layer has none.
    pub shared: Option<ExpertWeights>,
}

/// A mixture-of-experts layer whose experts lie on several ranks, each with a device and tokens of its
/// own.
///
/// Outputs have the same bits as those of one [`MoeLayer`](wgmoe::MoeLayer) that holds all experts and
/// runs the tokens of all ranks as one batch, in the order of the ranks, on a device of the same kind:
/// whatever the number of ranks, and however experts and tokens are split.
///
/// Every method but the getters is called by all ranks, in the same order.
pub struct ExpertParallel {
    pub(crate) world: World,
    pub(crate) device: Device,
    pub(crate) config: LayerConfig,
    pub(crate) options: Options,
    pub(crate) split: Split,
    pub(crate) routing: MoeRouting,
    pub(crate) weights: RankWeights,
    pub(crate) owner: Option<Owner>,
    pub(crate) gather: Gather,
    pub(crate) combine: Combine,
    pub(crate) exchange: Rc<RefCell<dyn Exchange>>,
    pub(crate) tile_rows: u32,
}

impl ExpertParallel {
    /// A layer of `config` whose experts are split as `split` says; `router` and `weights` are this
    /// rank's copies of the router, its own experts and the shared ones.
    ///
    /// # Errors
    ///
    /// On every rank, naming the rank it is about: [`Error::Differs`] where ranks have another
    /// configuration, split, storage type, kind of device or version; [`Error::Idle`] for ranks
    /// without experts, unless [`Options::with_idle_ranks`] allows them; [`Error::Rank`] for what failed
    /// on one rank; [`Error::Silent`] for ranks that do not call.
    pub fn new(
        world: &World,
        (ctx, queue): (&Context, &wgpu::Queue),
        config: LayerConfig,
        (split, options): (&Split, Options),
        router: Router,
        weights: RankWeights,
    ) -> Result<Self> {
        let staged = Staged::new(world, ctx.device(), queue);
        let exchange = Rc::new(RefCell::new(staged));
        let device = (ctx, queue);
        Self::with_exchange(world, device, config, (split, options), router, weights, exchange)
    }

    /// The same with another way to move rows: the hook for engines whose MPI reads device memory.
    /// Layers of one device can share it.
    ///
    /// # Errors
    ///
    /// As [`ExpertParallel::new`].
    pub fn with_exchange(
        world: &World,
        (ctx, queue): (&Context, &wgpu::Queue),
        config: LayerConfig,
        (split, options): (&Split, Options),
        router: Router,
        weights: RankWeights,
        exchange: Rc<RefCell<dyn Exchange>>,
    ) -> Result<Self> {
        world.telling(|| {
            let tile_rows = tile_rows(ctx);
            let shape = |w: &Option<ExpertWeights>| match w {
                Some(w) => format!("{:?}", w.shape().types),
                None => "none".into(),
            };
            // Only units in use change bits; why there are none may differ from rank to rank.
            let matrix = match ctx.matrix() {
                MatrixReport::InUse { shape, precision, .. } => format!("{shape}, {precision:?}"),
                _ => "none".into(),
            };
            // Ranks without experts have no type of their own; a rank that lacks them says so below.
            let types = weights.experts.as_ref().map(|w| w.shape().types);
            world.agree(&[
                ("version", version(&options)),
                ("hidden", config.hidden.to_string()),
                ("intermediate", config.intermediate.to_string()),
                ("experts", config.experts.to_string()),
                ("shared_experts", config.shared_experts.to_string()),
                ("activation", format!("{:?}", config.activation)),
                ("routing", format!("{:?}", config.routing)),
                ("split", format!("{split:?}")),
                ("options", format!("{options:?}")),
                ("matrix units", matrix),
                ("variant", format!("{:?}, items of {tile_rows} rows", ctx.variant())),
                ("weights of shared experts", shape(&weights.shared)),
            ])?;
            world.agree_some("weights of experts", types.map(|t| format!("{t:?}")))?;
            if split.ranks() != world.ranks() || split.experts() != config.experts {
                let (ranks, experts) = (world.ranks(), config.experts);
                let reason = format!(
                    "{} experts on {} ranks, the layer has {experts} and the job {ranks}",
                    split.experts(),
                    split.ranks()
                );
                return Err(Error::invalid("split", reason));
            }
            if !options.idle_ranks {
                let what = format!("no expert of {experts}", experts = config.experts);
                world.none_idle(&what, |r| split.experts_of(r).is_empty())?;
            }
            let held = split.experts_of(world.rank()).len() as u32;
            fits("weights of experts", &weights.experts, &config, held)?;
            fits("weights of shared experts", &weights.shared, &config, config.shared_experts)?;
            let chunk_rows = options.chunk_rows.max(1).next_multiple_of(tile_rows);
            let options = Options { chunk_rows, rounds: options.rounds.max(1), ..options };
            let owner = match &weights.experts {
                Some(w) if held > 0 => {
                    Some(Owner::new(ctx, &config, w, [chunk_rows, options.rounds])?)
                }
                _ => None,
            };
            let layer = Self {
                device: Device { ctx: ctx.clone(), queue: queue.clone() },
                routing: MoeRouting::new(ctx, config, router)?,
                gather: Gather::new(ctx)?,
                combine: Combine::new(ctx)?,
                world: world.clone(),
                split: split.clone(),
                config,
                options,
                weights,
                owner,
                exchange,
                tile_rows,
            };
            // The others learn here of what failed on one rank above.
            world.agree(&[("made", "yes".into())])?;
            Ok(layer)
        })
    }

    /// Makes what is needed to run the layer on this rank's tokens.
    ///
    /// # Errors
    ///
    /// On every rank, naming the rank it is about: what [`MoeRouting::bind`] refuses, other numbers of
    /// sequences or a residual where others have none, [`Error::Idle`] for ranks without tokens,
    /// unless [`Options::with_idle_ranks`] allows them, and for batches over whose tokens this rule
    /// cannot choose.
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundParallel<'_>> {
        self.world.telling(|| BoundParallel::new(self, batch))
    }

    /// The configuration.
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Which rank holds which experts.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// The weights of this rank.
    pub fn weights(&self) -> &RankWeights {
        &self.weights
    }

    /// The ranks.
    pub fn world(&self) -> &World {
        &self.world
    }
}

/// What ranks that work together are made of.
fn version(options: &Options) -> String {
    let own = env!("CARGO_PKG_VERSION");
    match options.engine {
        "" => format!("{own}, protocol {PROTOCOL}"),
        engine => format!("{own}, protocol {PROTOCOL}, {engine}"),
    }
}

/// Checks the weights of so many experts.
fn fits(
    name: &'static str,
    weights: &Option<ExpertWeights>,
    config: &LayerConfig,
    experts: u32,
) -> Result<()> {
    let want = (experts > 0).then_some([experts, config.hidden, config.intermediate]);
    let got = weights.as_ref().map(|w| {
        let shape = w.shape();
        [shape.experts, shape.hidden, shape.intermediate]
    });
    // A rank without experts may hold what nobody uses.
    if got == want || (want.is_none() && experts == 0) {
        return Ok(());
    }
    let reason = format!("[experts, hidden, intermediate] {got:?}, expected {want:?}");
    Err(Error::invalid(name, reason))
}
