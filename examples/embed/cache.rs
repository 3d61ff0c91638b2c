//! The engine's pipeline cache: with `embed FILE` the pipelines come from the file that the run before has written.
use std::path::PathBuf;
use std::{env, fs, io};
use wgmoe::wgpu;
use wgmoe::{Context, ContextOptions};

/// The cache and its file; neither where no file is named, or where the adapter takes none.
pub(crate) struct Pipelines(Option<(wgpu::PipelineCache, PathBuf)>);

impl Pipelines {
    /// What the device needs for it, as far as the adapter has that.
    pub(crate) fn features(adapter: &wgpu::Adapter) -> wgpu::Features {
        adapter.features() & wgpu::Features::PIPELINE_CACHE
    }

    pub(crate) fn open(device: &wgpu::Device) -> Self {
        let file = env::args_os().nth(1).map(PathBuf::from);
        let usable = device.features().contains(wgpu::Features::PIPELINE_CACHE);
        let Some(file) = file.filter(|_| usable) else { return Self(None) };
        let data = fs::read(&file).ok();
        println!("pipelines: {} bytes from {}", data.as_ref().map_or(0, Vec::len), file.display());
        Self(Some((create(device, data.as_deref()), file)))
    }

    /// A context whose kernels are taken from the cache, and put into it.
    pub(crate) fn context(&self, device: &wgpu::Device) -> wgmoe::Result<Context> {
        let options = ContextOptions::default();
        Context::with_options(
            device,
            match &self.0 {
                Some((cache, _)) => options.with_cache(cache.clone()),
                None => options,
            },
        )
    }

    pub(crate) fn save(&self) -> io::Result<()> {
        let Some((cache, file)) = &self.0 else { return Ok(()) };
        let data = cache.get_data().unwrap_or_default();
        println!("pipelines: {} bytes to {}", data.len(), file.display());
        fs::write(file, data)
    }
}

/// A cache that starts from `data`, or empty where wgpu sees that the data is of another device or driver.
#[expect(unsafe_code, reason = "wgpu cannot know where the data comes from")]
fn create(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor { label: None, data, fallback: true };
    // SAFETY: the file is one that `save` has written.
    unsafe { device.create_pipeline_cache(&descriptor) }
}
