//! The adapters of this machine, and devices made of them whose errors are kept, not thrown.
use crate::file;
use crate::timing::Stop;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use wgmoe::{Gpu, wgpu};

/// A device, and what went wrong on it outside all error scopes.
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    errors: Arc<Mutex<Vec<String>>>,
    lost: Arc<Mutex<Option<String>>>,
}

impl Device {
    /// Opens an adapter, with its matrix units where they are asked for and it has them, or says what
    /// it lacks.
    pub(crate) async fn open(adapter: &wgpu::Adapter, matrix_units: bool) -> Result<Self, String> {
        if let Some(lack) = lack(adapter) {
            return Err(lack);
        }
        let gpu = if matrix_units {
            testkit::device::with_matrix_units(adapter).await
        } else {
            Gpu::from_adapter(adapter).await
        };
        let gpu = gpu.map_err(|e| e.to_string())?;
        let errors = Arc::new(Mutex::new(vec![]));
        let kept = errors.clone();
        gpu.device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(e.to_string());
        }));
        let lost = Arc::new(Mutex::new(None));
        let told = lost.clone();
        gpu.device.set_device_lost_callback(move |reason, message| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            *told = Some(format!("the device was lost ({reason:?}): {message}"));
        });
        Ok(Self { gpu, errors, lost })
    }

    /// Fails where an error was reported since the last call.
    pub(crate) fn errors(&self) -> Result<(), Stop> {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *errors).into_iter().next() {
            Some(first) => Err(Stop::Failed(first)),
            None => Ok(()),
        }
    }

    /// Why the device can do no more work, if so.
    pub(crate) async fn lost(&self) -> Option<String> {
        let told = self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match told {
            None => self.gpu.wait_async().await.err().map(|e| e.to_string()),
            told => told,
        }
    }
}

/// What is said where there is nothing to measure.
pub const NO_ADAPTERS: &str = "no adapters: wgpu found no driver of Vulkan, Metal, DX12 or \
    OpenGL. On Linux, `scripts/with-vulkan` in wgmoe's repository installs a software driver and \
    then runs a command: scripts/with-vulkan cargo run --release -p wgmoe-bench -- run --quick";

/// The adapters of all backends.
pub async fn adapters() -> Vec<wgpu::Adapter> {
    let all = Gpu::adapters().await;
    all.into_iter().filter(|a| a.get_info().backend != wgpu::Backend::Noop).collect()
}

/// What an adapter lacks that every kernel needs.
fn lack(adapter: &wgpu::Adapter) -> Option<String> {
    let flags = adapter.get_downlevel_capabilities().flags;
    if !flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) {
        return Some("no compute shaders".into());
    }
    let (limits, least) = (adapter.limits(), wgpu::Limits::default());
    [
        (
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage,
            least.max_storage_buffers_per_shader_stage,
        ),
        (
            "max_compute_workgroup_storage_size",
            limits.max_compute_workgroup_storage_size,
            least.max_compute_workgroup_storage_size,
        ),
        (
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup,
            least.max_compute_invocations_per_workgroup,
        ),
    ]
    .into_iter()
    .find(|(_, have, need)| have < need)
    .map(|(name, have, need)| format!("{name} is {have}, the kernels need {need}"))
}

/// The adapter to measure where none is named: a GPU before a software driver, OpenGL last.
pub fn first(adapters: &[wgpu::Adapter]) -> Option<usize> {
    (0..adapters.len()).min_by_key(|&i| {
        let info = adapters[i].get_info();
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (kind, info.backend == wgpu::Backend::Gl)
    })
}

/// The adapter of this index, or the first whose name holds `want`.
///
/// # Errors
///
/// Which adapters there are, where it is none of them.
pub fn find(adapters: &[wgpu::Adapter], want: &str) -> Result<usize, String> {
    let names: Vec<String> = adapters.iter().map(|a| a.get_info().name).collect();
    let by_name = || names.iter().position(|n| n.to_lowercase().contains(&want.to_lowercase()));
    want.parse().ok().filter(|&i| i < adapters.len()).or_else(by_name).ok_or_else(|| {
        let mut text = format!("no adapter `{want}`; there are:");
        for (i, name) in names.iter().enumerate() {
            let _ = write!(text, "\n  {i}: {name}");
        }
        text
    })
}

fn wanted() -> [(&'static str, wgpu::Features); 3] {
    [
        ("subgroups", wgpu::Features::SUBGROUP),
        ("64-bit integers", wgpu::Features::SHADER_INT64),
        ("timestamps", wgpu::Features::TIMESTAMP_QUERY),
    ]
}

/// An adapter as the file has it, nothing measured yet.
pub(crate) fn describe(adapter: &wgpu::Adapter) -> file::Adapter {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let has = wanted().into_iter().filter(|(_, f)| adapter.features().contains(*f));
    file::Adapter {
        name: info.name,
        vendor: info.vendor,
        backend: info.backend.to_string(),
        kind: format!("{:?}", info.device_type),
        driver: format!("{} {}", info.driver, info.driver_info).trim().into(),
        features: has.map(|(name, _)| name.into()).collect(),
        matrix_units: String::new(),
        max_binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        max_buffer_bytes: limits.max_buffer_size,
        failure: None,
        ceilings: None,
        cases: vec![],
    }
}

/// All adapters in words.
pub fn list(adapters: &[wgpu::Adapter]) -> String {
    if adapters.is_empty() {
        return format!("{NO_ADAPTERS}\n");
    }
    let mut text = String::new();
    for (i, adapter) in adapters.iter().enumerate() {
        let (a, limits) = (describe(adapter), adapter.limits());
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        let features = if a.features.is_empty() { "none".into() } else { a.features.join(", ") };
        let _ = writeln!(text, "{i}: {}", a.name);
        for (what, value) in [
            ("backend", a.backend),
            ("type", a.kind),
            ("vendor", format!("{:#06x}", a.vendor)),
            ("driver", a.driver),
            ("largest binding", mib(a.max_binding_bytes)),
            ("largest buffer", mib(a.max_buffer_bytes)),
            (
                "workgroup",
                format!(
                    "{} invocations, {} KiB of memory",
                    limits.max_compute_invocations_per_workgroup,
                    limits.max_compute_workgroup_storage_size >> 10
                ),
            ),
            ("features", features),
            ("usable", lack(adapter).map_or("yes".into(), |why| format!("no: {why}"))),
        ] {
            let _ = writeln!(text, "   {what:<16} {value}");
        }
    }
    text
}
