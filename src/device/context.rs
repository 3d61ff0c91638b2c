//! A device as the kernels see it, with the pipelines made so far.
use super::guard::{alive, scoped};
use super::matrix::{MatrixReport, MatrixShape, MatrixUnits, Precision};
use super::record::Kernel;
use super::shader::{Prelude, Spec, WORKGROUP_BYTES};
use super::{Slice, Variant};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A device as the kernels see it: the device, the variant in use, and the pipelines made so far. Clones share the
/// pipelines, so any number of ops and layers made from one context compile each kernel once.
#[derive(Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("adapter", &self.info().name)
            .field("variant", &self.variant())
            .field("matrix", self.matrix())
            .field("pipelines", &self.pipelines())
            .finish_non_exhaustive()
    }
}

struct Inner {
    device: wgpu::Device,
    limits: wgpu::Limits,
    info: wgpu::AdapterInfo,
    variant: Variant,
    cache: Option<wgpu::PipelineCache>,
    units: Option<MatrixUnits>,
    matrix: MatrixReport,
    kernels: Mutex<HashMap<(&'static str, Prelude), Place>>,
    pipelines: AtomicUsize,
    /// Stands for optional inputs that are not given; never written, never read for its value.
    nothing: wgpu::Buffer,
}

/// Where a kernel lies once it is made. Whoever asks for it while another thread compiles it waits here, and others
/// do not.
type Place = Arc<Mutex<Option<Arc<Kernel>>>>;

/// What a [`Context`] is made with besides its device ([`Context::with_options`]).
#[derive(Clone, Debug, Default)]
pub struct ContextOptions {
    pub(crate) variant: Option<Variant>,
    pub(crate) cache: Option<wgpu::PipelineCache>,
    pub(crate) units: Option<MatrixUnits>,
}

impl ContextOptions {
    /// A chosen variant; the one that suits the device where none is given.
    #[must_use]
    pub fn with_variant(self, variant: Variant) -> Self {
        Self { variant: Some(variant), ..self }
    }

    /// The caller's pipeline cache, from which kernels are taken and into which they are put.
    #[must_use]
    pub fn with_cache(self, cache: wgpu::PipelineCache) -> Self {
        Self { cache: Some(cache), ..self }
    }

    /// Matrix units that kernels may use.
    #[must_use]
    pub fn with_matrix_units(self, units: MatrixUnits) -> Self {
        Self { units: Some(units), ..self }
    }
}

impl Context {
    /// A context with the variant that suits the device.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost or out of memory.
    pub fn new(device: &wgpu::Device) -> Result<Self> {
        Self::with_variant(device, Variant::best(device))
    }

    /// A context with a chosen variant.
    ///
    /// # Errors
    ///
    /// [`Error::Feature`] where the variant needs more than the device was made with; [`Error::Device`]
    /// as for [`Context::new`].
    pub fn with_variant(device: &wgpu::Device, variant: Variant) -> Result<Self> {
        let report = MatrixReport::NotOffered;
        Self::make(device, variant, ContextOptions::default(), report)
    }

    pub(crate) fn make(
        device: &wgpu::Device,
        variant: Variant,
        ContextOptions { cache, units, .. }: ContextOptions,
        matrix: MatrixReport,
    ) -> Result<Self> {
        let missing = if variant.subgroups {
            wgpu::Features::SUBGROUP.difference(device.features())
        } else {
            wgpu::Features::empty()
        };
        if !missing.is_empty() {
            return Err(Error::Feature { missing });
        }
        alive(device)?;
        let nothing = scoped(device, || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("nothing"),
                size: 256,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        })?;
        let inner = Inner {
            device: device.clone(),
            limits: device.limits(),
            info: device.adapter_info(),
            variant,
            cache,
            units,
            matrix,
            kernels: Mutex::default(),
            pipelines: AtomicUsize::new(0),
            nothing,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The variant in use.
    pub fn variant(&self) -> Variant {
        self.inner.variant
    }

    /// Whether the kernels use matrix units, and why not.
    pub fn matrix(&self) -> &MatrixReport {
        &self.inner.matrix
    }

    /// The matrix units in use.
    pub(crate) fn matrix_in_use(&self) -> Option<(MatrixShape, Precision)> {
        self.inner.matrix.in_use()
    }

    /// What this context was made with, for others of the same device.
    pub(crate) fn options(&self) -> ContextOptions {
        let Inner { variant, cache, units, .. } = &*self.inner;
        let (cache, units) = (cache.clone(), units.clone());
        ContextOptions { variant: Some(*variant), cache, units }
    }

    /// The device's limits.
    pub fn limits(&self) -> &wgpu::Limits {
        &self.inner.limits
    }

    /// The adapter.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.inner.info
    }

    /// Pipelines made so far.
    pub fn pipelines(&self) -> usize {
        self.inner.pipelines.load(Ordering::Relaxed)
    }

    /// Whether the other is a clone of this one.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Stands for an optional input that is not given.
    pub(crate) fn nothing(&self) -> Slice<'_> {
        (&self.inner.nothing).into()
    }

    /// Bytes that one storage binding can hold.
    pub(crate) fn max_binding(&self) -> u64 {
        self.inner.limits.max_storage_buffer_binding_size.min(self.inner.limits.max_buffer_size)
    }

    /// A buffer of ours, written by kernels and readable by copies.
    pub(crate) fn scratch(&self, name: &'static str, size: u64) -> Result<wgpu::Buffer> {
        self.within(name, size)?;
        alive(self.device())?;
        scoped(self.device(), || {
            self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(name),
                size: size.max(16).next_multiple_of(16),
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }

    pub(crate) fn within(&self, name: &'static str, need: u64) -> Result<()> {
        let have = self.max_binding();
        let limit = "max_storage_buffer_binding_size";
        if need <= have { Ok(()) } else { Err(Error::Limit { name, limit, need, have }) }
    }

    /// The pipeline of a kernel in a variant, made now if it is the first of its kind.
    pub(crate) fn kernel(&self, spec: &'static Spec, prelude: Prelude) -> Result<Arc<Kernel>> {
        // Also where the kernel is there: a layer of a lost device is an error, not a surprise later.
        alive(self.device())?;
        let key = (spec.name, prelude);
        let place = {
            let mut kernels = self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
            match kernels.get(&key) {
                Some(place) => place.clone(),
                None => kernels.entry(key.clone()).or_default().clone(),
            }
        };
        let mut made = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = &*made {
            return Ok(kernel.clone());
        }
        // Here, where it costs once a kernel.
        debug_assert!(
            spec.lists(&key.1),
            "{} ({}) is none of the kernel's variants",
            spec.name,
            key.1.label
        );
        let missing = key.1.features.difference(self.device().features());
        if !missing.is_empty() {
            return Err(Error::Feature { missing });
        }
        let (need, have) =
            (spec.bindings.len() as u64, self.limits().max_storage_buffers_per_shader_stage.into());
        if need > have {
            let limit = "max_storage_buffers_per_shader_stage";
            return Err(Error::Limit { name: spec.name, limit, need, have });
        }
        // wgpu does not look at this limit, and drivers crash: all kernels stay within WebGPU's default.
        let have = self.limits().max_compute_workgroup_storage_size.into();
        if have < WORKGROUP_BYTES && spec.source(&key.1).contains("var<workgroup>") {
            let limit = "max_compute_workgroup_storage_size";
            return Err(Error::Limit { name: spec.name, limit, need: WORKGROUP_BYTES, have });
        }
        let kernel = Arc::new(scoped(self.device(), || {
            Kernel::new(self.device(), spec, &key.1, self.inner.cache.as_ref())
        })?);
        self.inner.pipelines.fetch_add(1, Ordering::Relaxed);
        Ok(made.insert(kernel).clone())
    }
}
