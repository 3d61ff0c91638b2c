//! Error scopes around everything that makes wgpu objects: no error reaches the device's uncaptured-error handler.
use crate::{Error, Result};

/// Runs what makes wgpu objects under error scopes, so that no error reaches the device's uncaptured-error handler (but in a
/// browser).
pub(crate) fn watched<T>(
    device: &wgpu::Device,
    make: impl FnOnce() -> T,
) -> (T, Option<wgpu::Error>) {
    // A browser answers later than we can wait for. Without scopes its errors reach the device's uncaptured-error handler,
    // or else the console; popped and not waited for, they would be lost.
    if cfg!(target_family = "wasm") {
        return (make(), None);
    }
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let made = make();
    let errors = [validation.pop(), internal.pop(), memory.pop()].map(pollster::block_on);
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
