//! Compiled kernels, their arguments, and the work that is recorded: the only file that builds
//! pipelines and bind groups.
use super::guard::{holding, scoped};
use super::shader::{Prelude, Spec};
use super::{Context, Slice};
use crate::{Error, Result};
use bytemuck::NoUninit;
use std::sync::Arc;

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
    pub(super) fn new(
        device: &wgpu::Device,
        spec: &'static Spec,
        prelude: &Prelude,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let label = Some(spec.name);
        let mut entries = vec![layout_entry(0, wgpu::BufferBindingType::Uniform)];
        for (i, b) in (1..).zip(spec.bindings) {
            let read_only = !b.written && !b.is_shared(prelude, i - 1);
            entries.push(layout_entry(i, wgpu::BufferBindingType::Storage { read_only }));
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

    /// Binds `params` at 0 and `slices` at 1, 2, ...; `groups` workgroups will run, folded into
    /// three dimensions.
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
        });
        let bind_group = bind_group.map_err(|e| self.refused(device, slices, e))??;
        Ok(Dispatch { kernel: self.clone(), bind_group, groups, stage: None, page: None })
    }

    /// What wgpu refused, with the argument that it was about: the first that it refuses alone too.
    /// wgpu itself knows buffers by their labels, and looks at all before it says which is of
    /// another device.
    fn refused(&self, device: &wgpu::Device, slices: &[Slice<'_>], error: Error) -> Error {
        let Error::Device(text) = error else { return error };
        let alone = |slice: &Slice<'_>| {
            scoped(device, || {
                let ty = wgpu::BufferBindingType::Storage { read_only: true };
                let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                    label: None,
                    entries: &[layout_entry(0, ty)],
                });
                device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: None,
                    layout: &layout,
                    entries: &[wgpu::BindGroupEntry { binding: 0, resource: slice.binding() }],
                })
            })
        };
        let mut all = self.spec.bindings.iter().zip(slices);
        Error::Device(match all.find(|(_, slice)| alone(slice).is_err()) {
            Some((binding, _)) => format!("`{}`: {text}", binding.name),
            None => text,
        })
    }
}

fn layout_entry(binding: u32, ty: wgpu::BufferBindingType) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        // Smallest sizes are left to wgpu: items are wider in some variants than in others.
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
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
            return Err(Error::size(name, b.item, s.size));
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

/// `groups` workgroups as a grid within the device's limit; a few more may run, which kernels turn
/// away.
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
    /// Kind of item, page and pages of a matmul.
    page: Option<(&'static str, usize, usize)>,
}

impl Dispatch {
    /// Name of the kernel.
    pub fn name(&self) -> &'static str {
        self.kernel.spec.name
    }

    /// What it computes, where several parts of a layer use one kernel: `logits`, `gate_up`,
    /// `down`.
    pub fn stage(&self) -> Option<&'static str> {
        self.stage
    }

    /// The name with what tells it from the other dispatches of a layer: the stage, and the page of
    /// weights where there are several (`matmul_tile gate_up, tile items, page 2 of 5`).
    pub fn label(&self) -> String {
        let mut label = self.name().to_string();
        if let Some(stage) = self.stage {
            label = format!("{label} {stage}");
        }
        if let Some((items, page, pages)) = self.page {
            label = format!("{label}, {items} items");
            if pages > 1 {
                label = format!("{label}, page {} of {pages}", page + 1);
            }
        }
        label
    }

    pub(crate) fn of_page(self, items: &'static str, page: usize, pages: usize) -> Self {
        Self { page: Some((items, page, pages)), ..self }
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

/// Bound work: dispatches in order. Recording makes no buffer, bind group or pipeline, and may be
/// repeated; what the bound buffers hold is read when the work runs.
#[derive(Clone, Debug, Default)]
pub struct BoundOp {
    dispatches: Vec<Dispatch>,
}

impl BoundOp {
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

impl From<Dispatch> for BoundOp {
    fn from(dispatch: Dispatch) -> Self {
        Self { dispatches: vec![dispatch] }
    }
}
