//! Kernels, variants and recorded steps: the only file that builds pipelines and bind groups.
use crate::{Error, Result, Slice};
use bytemuck::NoUninit;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

/// Most workgroup memory of a kernel, in bytes: WebGPU's default limit.
pub const WORKGROUP_BYTES: u64 = 16_384;

/// Every kernel of the crate. `tests/suite/shaders.rs` validates each one in each variant, no GPU needed.
pub const SPECS: &[&Spec] = crate::ops::SPECS;

/// What a kernel is: its WGSL, and the one list of its bindings.
#[derive(Debug)]
pub struct Spec {
    /// File stem, entry point, debug label and bench group: one word.
    pub name: &'static str,
    /// The kernel's own WGSL, without prelude.
    pub body: &'static str,
    /// Names and byte offsets of the fields of the uniform at binding 0.
    pub params: &'static [(&'static str, u32)],
    /// The storage bindings, 1, 2, ...
    pub bindings: &'static [Binding],
    /// Every variant there is, whatever the device.
    pub variants: fn() -> Vec<Prelude>,
}

/// A storage binding of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name in the WGSL and in errors.
    pub name: &'static str,
    /// Whether the kernel writes it.
    pub written: bool,
    /// Bytes of one item, the smallest binding that makes sense.
    pub item: u64,
    /// Whether it stays `read` in every variant, since browsers must see that what is read from it is uniform: it cannot
    /// share a buffer with a binding that is written.
    pub uniform: bool,
}

impl Binding {
    /// Whether the binding at this place, which is only read, is declared `read_write` all the same.
    fn is_shared(&self, prelude: &Prelude, place: u32) -> bool {
        !self.written && !self.uniform && prelude.shared >> place & 1 == 1
    }
}

/// A binding that is read.
pub(crate) const fn read(name: &'static str, item: u64) -> Binding {
    Binding { name, written: false, item, uniform: false }
}

/// A binding that is read for values that barriers hang on.
pub(crate) const fn read_uniform(name: &'static str, item: u64) -> Binding {
    Binding { name, written: false, item, uniform: true }
}

/// A binding that is written, and perhaps read too.
pub(crate) const fn write(name: &'static str, item: u64) -> Binding {
    Binding { name, written: true, item, uniform: false }
}

/// What stands in front of a kernel's body: constants, and pieces of `shaders/lib` chosen among twins with the same
/// function names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Prelude {
    /// The choices in words.
    pub label: String,
    /// Features that the device needs.
    pub features: wgpu::Features,
    /// The text.
    pub text: String,
    /// Names of the pieces that the text is put together from, in order: those that the kernel's file lists.
    pub pieces: Vec<&'static str>,
    /// Bit set of the bindings (bit 0 is binding 1) that are declared `read_write` though they are only read, because their
    /// slice shares a buffer with one that is written. Those that are written, and [`Binding::uniform`] ones, take no notice.
    pub shared: u32,
}

impl Prelude {
    pub(crate) fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    pub(crate) fn constant(mut self, name: &str, value: u32) -> Self {
        let _ = writeln!(self.text, "const {name}: u32 = {value}u;");
        self
    }

    pub(crate) fn flag(mut self, name: &str, value: bool) -> Self {
        let _ = writeln!(self.text, "const {name}: bool = {value};");
        self
    }

    /// An alias of a type, as kernels that move whole vectors have one.
    pub(crate) fn alias(mut self, name: &str, ty: &str) -> Self {
        let _ = writeln!(self.text, "alias {name} = {ty};");
        self
    }

    pub(crate) fn piece(mut self, piece: Piece) -> Self {
        let _ = write!(self.text, "\n// piece: {}\n{}", piece.name, piece.wgsl);
        self.pieces.push(piece.name);
        self
    }

    /// A piece that only some variants have.
    pub(crate) fn maybe_piece(self, piece: Option<Piece>) -> Self {
        match piece {
            Some(piece) => self.piece(piece),
            None => self,
        }
    }

    pub(crate) fn needs(mut self, features: wgpu::Features) -> Self {
        self.features |= features;
        self
    }
}

/// A file of `shaders/lib`: see [`piece!`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) name: &'static str,
    pub(crate) wgsl: &'static str,
}

/// The piece of this name: its file's path in `shaders/lib`, without `.wgsl`.
macro_rules! piece {
    ($name:literal) => {
        crate::kernel::Piece {
            name: $name,
            wgsl: include_str!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/shaders/lib/",
                $name,
                ".wgsl"
            )),
        }
    };
}
pub(crate) use piece;

impl Spec {
    /// The WGSL handed to the driver.
    pub fn source(&self, prelude: &Prelude) -> String {
        // `enable` must come first. Browsers want `enable subgroups;`, naga 30 rejects it.
        let browser =
            cfg!(target_family = "wasm") && prelude.features.contains(wgpu::Features::SUBGROUP);
        let enable = if browser { "enable subgroups;\n" } else { "" };
        let source = format!(
            "{enable}// {}, variant: {}\n{}\n{}",
            self.name, prelude.label, prelude.text, self.body
        );
        (0..).zip(self.bindings).filter(|&(i, b)| b.is_shared(prelude, i)).fold(
            source,
            |source, (_, b)| {
                let [read, write] = ["read", "read_write"]
                    .map(|access| format!("var<storage, {access}> {}:", b.name));
                source.replace(&read, &write)
            },
        )
    }
}

/// Declares the uniform of a kernel, and its layout for the tests.
macro_rules! params {
    ($($field:ident: $ty:ty),* $(,)?) => {
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub(crate) struct Params { $(pub(crate) $field: $ty),* }

        impl Params {
            const LAYOUT: &[(&str, u32)] =
                &[$((stringify!($field), std::mem::offset_of!(Params, $field) as u32)),*];
        }
    };
}
pub(crate) use params;

/// What kind of device the kernels are laid out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Target {
    /// Wide devices: many lanes work on one row, and meet in workgroup memory.
    Gpu,
    /// Software drivers, where a barrier costs more than a row: one lane works on one row, and registers take the place
    /// of workgroup memory.
    Cpu,
}

/// Which of the variants of its kernels a [`Context`] uses. All give the same choices, and outputs equal within rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Variant {
    /// Layout of the work.
    pub target: Target,
    /// Use subgroup operations (`Features::SUBGROUP`).
    pub subgroups: bool,
}

impl Variant {
    /// The one that runs everywhere: no optional feature, within WebGPU's default limits.
    pub const PORTABLE: Self = Self { target: Target::Gpu, subgroups: false };

    /// The one this device is likely to be fastest with, by its adapter's type and its features.
    pub fn best(device: &wgpu::Device) -> Self {
        let cpu = device.adapter_info().device_type == wgpu::DeviceType::Cpu;
        Self {
            target: if cpu { Target::Cpu } else { Target::Gpu },
            subgroups: device.features().contains(wgpu::Features::SUBGROUP),
        }
    }

    /// Every variant this device can run.
    pub fn all(device: &wgpu::Device) -> Vec<Self> {
        let subgroups: &[bool] = if device.features().contains(wgpu::Features::SUBGROUP) {
            &[false, true]
        } else {
            &[false]
        };
        [Target::Gpu, Target::Cpu]
            .into_iter()
            .flat_map(|target| subgroups.iter().map(move |&subgroups| Self { target, subgroups }))
            .collect()
    }
}

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
    kernels: Mutex<HashMap<(&'static str, Prelude), Arc<Kernel>>>,
    /// Stands for optional inputs that are not given; never written, never read for its value.
    nothing: wgpu::Buffer,
}

impl Context {
    /// A context with the variant that suits the device.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost or out of memory.
    pub fn new(device: &wgpu::Device) -> Result<Self> {
        Self::with_variant(device, Variant::best(device), None)
    }

    /// A context with a chosen variant, and the caller's pipeline cache where there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Feature`] where the variant needs more than the device was made with; [`Error::Device`] as for
    /// [`Context::new`].
    pub fn with_variant(
        device: &wgpu::Device,
        variant: Variant,
        cache: Option<wgpu::PipelineCache>,
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
            kernels: Mutex::default(),
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
        self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Tells this context and its clones from all others that live.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
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
        let key = (spec.name, prelude);
        let mut kernels = self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
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
        alive(self.device())?;
        let kernel = Arc::new(scoped(self.device(), || {
            Kernel::new(self.device(), spec, &key.1, self.inner.cache.as_ref())
        })?);
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }
}

/// Runs what makes wgpu objects under error scopes, so that no error reaches the device's uncaptured-error handler.
pub(crate) fn watched<T>(
    device: &wgpu::Device,
    make: impl FnOnce() -> T,
) -> (T, Option<wgpu::Error>) {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let made = make();
    let errors = [validation.pop(), internal.pop(), memory.pop()].map(|pop| {
        // In a browser the answer comes later than we can wait for; its own console shows it.
        if cfg!(target_family = "wasm") { None } else { pollster::block_on(pop) }
    });
    (made, errors.into_iter().flatten().next())
}

/// As [`watched`], an error in place of what was made.
pub(crate) fn scoped<T>(device: &wgpu::Device, make: impl FnOnce() -> T) -> Result<T> {
    match watched(device, make) {
        (_, Some(e)) => Err(Error::Device(e.to_string())),
        (made, None) => Ok(made),
    }
}

/// Fails if the device is lost. wgpu tells no error scope of that, but the buffers of a lost device cannot be mapped.
pub(crate) fn alive(device: &wgpu::Device) -> Result<()> {
    holding(device, Some("probe"), wgpu::BufferUsages::UNIFORM, &[0; 4]).map(|_| ())
}

/// A buffer holding `contents`; wgpu's own helper panics on a lost device, and where memory runs out.
pub(crate) fn holding(
    device: &wgpu::Device,
    label: Option<&str>,
    usage: wgpu::BufferUsages,
    contents: &[u8],
) -> Result<wgpu::Buffer> {
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label,
        size: (contents.len() as u64).next_multiple_of(4).max(4),
        usage,
        mapped_at_creation: true,
    });
    match buffer.get_mapped_range_mut(..) {
        Ok(mut view) => view.slice(..contents.len()).copy_from_slice(contents),
        Err(e) => return Err(Error::Device(format!("the device is lost, or out of memory ({e})"))),
    }
    buffer.unmap();
    Ok(buffer)
}

/// A compiled kernel and its layout.
pub(crate) struct Kernel {
    spec: &'static Spec,
    prelude: Prelude,
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.spec.name, self.prelude.label)
    }
}

impl Kernel {
    fn new(
        device: &wgpu::Device,
        spec: &'static Spec,
        prelude: &Prelude,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let label = Some(spec.name);
        // Smallest sizes are left to wgpu: items are wider in some variants than in others.
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        for (i, b) in (1..).zip(spec.bindings) {
            let read_only = !b.written && !b.is_shared(prelude, i - 1);
            entries.push(entry(i, wgpu::BufferBindingType::Storage { read_only }));
        }
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label,
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(spec.source(prelude).into()),
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(spec.name),
            compilation_options: wgpu::PipelineCompilationOptions {
                // No kernel of ours reads workgroup memory that it has not written.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache,
        });
        Self { spec, prelude: prelude.clone(), pipeline, layout }
    }

    /// Binds `params` at 0 and `slices` at 1, 2, ...; `groups` workgroups will run, folded into three dimensions.
    pub(crate) fn dispatch(
        self: &Arc<Self>,
        ctx: &Context,
        params: &impl NoUninit,
        slices: &[Slice<'_>],
        groups: u64,
    ) -> Result<Dispatch> {
        assert_eq!(slices.len(), self.spec.bindings.len(), "{}: bindings", self.spec.name);
        let shared = check(ctx, self.spec, slices)?;
        if shared != self.prelude.shared {
            let prelude = Prelude { shared, ..self.prelude.clone() };
            return ctx.kernel(self.spec, prelude)?.dispatch(ctx, params, slices, groups);
        }
        let groups = fold(ctx, self.spec.name, groups)?;
        let device = ctx.device();
        let label = Some(self.spec.name);
        let bind_group = scoped(device, || {
            let usage = wgpu::BufferUsages::UNIFORM;
            let params = holding(device, label, usage, bytemuck::bytes_of(params))?;
            let mut entries =
                vec![wgpu::BindGroupEntry { binding: 0, resource: params.as_entire_binding() }];
            for (binding, s) in (1..).zip(slices) {
                entries.push(wgpu::BindGroupEntry { binding, resource: s.binding() });
            }
            let layout = &self.layout;
            Ok(device.create_bind_group(&wgpu::BindGroupDescriptor {
                label,
                layout,
                entries: &entries,
            }))
        })??;
        Ok(Dispatch { kernel: self.clone(), bind_group, groups, stage: None })
    }
}

/// Checks of slices that hold for every kernel; the bindings of [`Prelude::shared`].
fn check(ctx: &Context, spec: &Spec, slices: &[Slice<'_>]) -> Result<u32> {
    let alignment = u64::from(ctx.limits().min_storage_buffer_offset_alignment);
    for (b, s) in spec.bindings.iter().zip(slices) {
        let name = b.name;
        let missing = wgpu::BufferUsages::STORAGE.difference(s.buffer.usage());
        if !missing.is_empty() {
            return Err(Error::Usage { name, missing });
        }
        let (size, offset) = (s.buffer.size(), s.offset);
        if s.end() > size || offset.checked_add(s.size).is_none() {
            return Err(Error::OutOfBuffer { name, offset, end: s.end(), size });
        }
        if s.size < b.item {
            return Err(Error::Size { name, expected: b.item, got: s.size });
        }
        if offset % alignment != 0 {
            return Err(Error::Alignment { name, offset, alignment });
        }
        ctx.within(name, s.size)?;
    }
    let mut shared = 0;
    for (i, (a, s)) in spec.bindings.iter().zip(slices).enumerate() {
        for (j, (b, t)) in spec.bindings.iter().zip(slices).enumerate() {
            if a.written && i != j {
                if s.overlaps(t) {
                    return Err(Error::Overlap { written: a.name, other: b.name });
                }
                if s.buffer == t.buffer && b.uniform {
                    let reason =
                        format!("must not lie in the buffer of `{}`, which is written", a.name);
                    return Err(Error::invalid(b.name, reason));
                }
                if s.buffer == t.buffer && !b.written {
                    shared |= 1 << j;
                }
            }
        }
    }
    Ok(shared)
}

/// `groups` workgroups as a grid within the device's limit; a few more may run, which kernels turn away.
fn fold(ctx: &Context, name: &'static str, groups: u64) -> Result<[u32; 3]> {
    let max = u64::from(ctx.limits().max_compute_workgroups_per_dimension);
    let y = groups.div_ceil(max).max(1);
    let z = y.div_ceil(max);
    if z > max {
        let limit = "max_compute_workgroups_per_dimension";
        return Err(Error::Limit { name, limit, need: z, have: max });
    }
    let y = y.div_ceil(z);
    let x = groups.div_ceil(y * z);
    Ok([x as u32, y as u32, z as u32]) // each at most `max`, a u32
}

/// One kernel with its arguments, ready to be recorded any number of times.
#[derive(Clone, Debug)]
pub struct Dispatch {
    kernel: Arc<Kernel>,
    bind_group: wgpu::BindGroup,
    groups: [u32; 3],
    stage: Option<&'static str>,
}

impl Dispatch {
    /// Name of the kernel.
    pub fn name(&self) -> &'static str {
        self.kernel.spec.name
    }

    /// What it computes, where several parts of a layer use one kernel: `logits`, `gate_up`, `down`.
    pub fn stage(&self) -> Option<&'static str> {
        self.stage
    }

    pub(crate) fn of_stage(self, stage: &'static str) -> Self {
        Self { stage: Some(stage), ..self }
    }

    /// Records it.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        let [x, y, z] = self.groups;
        if x == 0 {
            return; // nothing to do
        }
        pass.set_pipeline(&self.kernel.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Bound work: dispatches in order. Recording makes no buffer, bind group or pipeline, and may be repeated; what the
/// bound buffers hold is read when the work runs.
#[derive(Clone, Debug, Default)]
pub struct Step {
    dispatches: Vec<Dispatch>,
}

impl Step {
    /// The dispatches, in the order they run.
    pub fn dispatches(&self) -> &[Dispatch] {
        &self.dispatches
    }

    /// Records all dispatches into the caller's pass. Nothing runs until the encoder is submitted.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        for dispatch in &self.dispatches {
            dispatch.record(pass);
        }
    }

    /// This work, then `other`.
    #[must_use]
    pub fn then(mut self, other: Self) -> Self {
        self.dispatches.extend(other.dispatches);
        self
    }
}

impl From<Dispatch> for Step {
    fn from(dispatch: Dispatch) -> Self {
        Self { dispatches: vec![dispatch] }
    }
}
