//! Weights that learn, from Burn's rows to the pages that the layer's kernels read, on the device.
use crate::op::Place;
use std::ops::Range;
use wgmoe::weights::Projection;
use wgmoe::wgpu::util::DeviceExt;
use wgmoe::{Context, Error, ExpertWeights, Result, WeightType, wgpu};

/// The kernel, compiled once for a device.
#[derive(Clone, Debug)]
pub(crate) struct Packer {
    device: wgpu::Device,
    pipeline: wgpu::ComputePipeline,
    /// Where a binding may begin.
    alignment: u64,
}

/// One page of a layer.
#[derive(Clone, Debug)]
struct Page {
    projection: Projection,
    experts: Range<u32>,
    rows: Range<u32>,
    packed: wgpu::Buffer,
}

/// A page, ready to be packed from wherever the weights lie.
#[derive(Clone, Debug)]
struct BoundPage {
    projection: Projection,
    params: wgpu::Buffer,
    packed: wgpu::Buffer,
    /// First byte, and bytes, of what is read.
    from: [u64; 2],
    groups: [u32; 2],
}

/// All pages of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    packer: Packer,
    pages: Vec<BoundPage>,
}

impl Packer {
    pub(crate) fn new(ctx: &Context) -> Self {
        let device = ctx.device().clone();
        let module = device.create_shader_module(wgpu::include_wgsl!("pack.wgsl"));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("pack weights"),
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: Default::default(),
            cache: None,
        });
        let alignment = device.limits().min_storage_buffer_offset_alignment.into();
        Self { device, pipeline, alignment }
    }

    /// The pages of f32 weights.
    pub(crate) fn packing(&self, weights: &ExpertWeights) -> Result<Packing> {
        let shape = weights.shape();
        for types in [shape.types, shape.last_types] {
            if types != WeightType::F32.into() {
                let reason = "weights that learn here are f32".to_owned();
                return Err(Error::Invalid { name: "weight_type", reason });
            }
        }
        let pages = Projection::ALL.into_iter().flat_map(|p| pages(weights, p));
        let pages = pages.map(|page| {
            let matrix = shape.matrix(page.projection);
            self.page(page, matrix)
        });
        Ok(Packing { packer: self.clone(), pages: pages.collect() })
    }

    fn page(&self, page: Page, [rows, depth]: [u32; 2]) -> BoundPage {
        let Page { projection, experts, rows: of, packed } = page;
        let row = 4 * u64::from(depth);
        let first = (u64::from(experts.start) * u64::from(rows) + u64::from(of.start)) * row;
        let start = first / self.alignment * self.alignment;
        let matrices = u64::from(experts.end - experts.start - 1) * u64::from(rows);
        let bytes = (matrices + u64::from(of.end - of.start)) * row;
        let words = (packed.size() / 16) as u32;
        let groups = words.div_ceil(64);
        let across = groups.clamp(1, self.device.limits().max_compute_workgroups_per_dimension);
        let params =
            [rows, depth, of.end - of.start, words, across, ((first - start) / 4) as u32, 0, 0];
        let params = self.device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: Some("pack weights"),
            contents: &params.map(u32::to_le_bytes).concat(),
            usage: wgpu::BufferUsages::UNIFORM,
        });
        let from = [start, first - start + bytes];
        let groups = [across, groups.div_ceil(across)];
        BoundPage { projection, params, packed, from, groups }
    }
}

/// A page for each buffer: experts in their order, or some rows of one.
fn pages(weights: &ExpertWeights, projection: Projection) -> Vec<Page> {
    let mut pages: Vec<Page> = vec![];
    for expert in 0..weights.shape().experts {
        for (rows, slice) in weights.slices(expert, projection) {
            match pages.last_mut() {
                Some(last) if last.packed == *slice.buffer => last.experts.end = expert + 1,
                _ => {
                    let packed = slice.buffer.clone();
                    pages.push(Page { projection, experts: expert..expert + 1, rows, packed });
                }
            }
        }
    }
    pages
}

impl Packing {
    /// Records that the weights at these places, of [`Projection::ALL`], are packed.
    pub(crate) fn record(&self, encoder: &mut wgpu::CommandEncoder, places: [&Place; 3]) {
        let Packer { device, pipeline, .. } = &self.packer;
        let layout = pipeline.get_bind_group_layout(0);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("pack weights"),
            ..Default::default()
        });
        pass.set_pipeline(pipeline);
        for page in &self.pages {
            let place = places[page.projection as usize];
            let [start, bytes] = page.from;
            let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("pack weights"),
                layout: &layout,
                entries: &[
                    wgpu::BindGroupEntry { binding: 0, resource: page.params.as_entire_binding() },
                    wgpu::BindGroupEntry {
                        binding: 1,
                        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                            buffer: &place.buffer,
                            offset: place.offset + start,
                            size: wgpu::BufferSize::new(bytes),
                        }),
                    },
                    wgpu::BindGroupEntry { binding: 2, resource: page.packed.as_entire_binding() },
                ],
            });
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(page.groups[0], page.groups[1], 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgmoe::Gpu;
    use wgmoe::weights::{ExpertShape, HostWeights};

    /// What `write` packs on the host, in whole pages, in pages of some experts, and in pages of some columns.
    #[test]
    fn packs_as_weights_are_written() {
        let gpu = Gpu::new().expect("a device");
        let ctx = Context::new(&gpu.device).unwrap();
        let packer = Packer::new(&ctx);
        for (d, f, limit) in
            [(64, 32, u64::MAX), (38, 27, u64::MAX), (64, 96, 60_000), (70, 90, 20_000)]
        {
            let shape = ExpertShape::new(5, d, f, WeightType::F32);
            let [want, got] =
                [(); 2].map(|()| ExpertWeights::with_page_limit(&ctx, shape, limit).unwrap());
            let size = (d * f) as usize;
            let values = |p: usize| -> Vec<f32> {
                (0..5 * size).map(|i| ((i * 7919 + p * 104_729) % 65_521) as f32 - 3e4).collect()
            };
            let places = [0, 1, 2].map(|p| {
                for (e, matrix) in (0..).zip(values(p).chunks(size)) {
                    want.write(&gpu.queue, e, Projection::ALL[p], HostWeights::F32(matrix))
                        .unwrap();
                }
                // Somewhere in a buffer, as Burn's tensors are.
                let mut all = vec![f32::NAN; 64];
                all.extend(values(p));
                Place { buffer: gpu.upload(&all), offset: 256, size: 4 * 5 * size as u64 }
            });
            let packing = packer.packing(&got).unwrap();
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            packing.record(&mut encoder, places.each_ref());
            gpu.queue.submit([encoder.finish()]);
            assert_eq!(want.page_counts(), got.page_counts());
            for (i, (want, got)) in want.buffers().zip(got.buffers()).enumerate() {
                let [want, got] = [want, got].map(|b| gpu.download::<u32>(b).unwrap());
                assert_eq!(want, got, "{d} {f} {limit}: page {i}");
            }
        }
    }
}
