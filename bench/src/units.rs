//! What the matrix units of a device can do at best.
use crate::timing::{Stop, Timer};
use wgmoe::device::MatrixReport;
use wgmoe::{Context, wgpu};

/// Workgroups of a device that is kept busy, and of a software driver.
const GROUPS: u32 = 1 << 12;
const SOFTWARE_GROUPS: u32 = 4;
/// Of the WGSL: operations of a subgroup on squares of side 1.
const FLOPS_OF_A_SUBGROUP: f64 = 4.0 * 1024.0 * 2.0;

/// Products of squares in registers, as the context's kernels make them, two operations a
/// multiply-add, 10^9 a second; none where its kernels do without.
pub(crate) async fn measure(
    timer: &Timer<'_>,
    ctx: &Context,
    seconds: f64,
) -> Result<Option<f64>, Stop> {
    let MatrixReport::InUse { shape, .. } = ctx.matrix() else { return Ok(None) };
    let gpu = timer.gpu();
    let (side, input) = (shape.side(), if shape.has_floats() { "f32" } else { "f16" });
    let matrix = |of: &str| format!("coop_mat{side}x{side}<{of}>");
    let [a, b, sum] = [format!("{input}, A"), format!("{input}, B"), "f32, C".into()];
    let wgsl = format!(
        "enable wgpu_cooperative_matrix;\nenable f16;\nconst SIDE: u32 = {side}u;\n\
         alias Input = {input};\nalias InputA = {};\nalias InputB = {};\nalias Sum = {};\n{}",
        matrix(&a),
        matrix(&b),
        matrix(&sum),
        include_str!("units.wgsl"),
    );
    let device = &gpu.device;
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("units"),
        source: wgpu::ShaderSource::Wgsl(wgsl.into()),
    });
    let kernel = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("multiply_squares"),
        layout: None,
        module: &module,
        entry_point: Some("multiply_squares"),
        compilation_options: Default::default(),
        cache: None,
    });
    let out = gpu.upload(&[0u32; 2]);
    let bindings = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &kernel.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: out.as_entire_binding() }],
    });
    let software = gpu.info.device_type == wgpu::DeviceType::Cpu;
    let groups = if software { SOFTWARE_GROUPS } else { GROUPS };
    let record = |_: usize, pass: &mut wgpu::ComputePass<'_>| {
        pass.set_pipeline(&kernel);
        pass.set_bind_group(0, &bindings, &[]);
        pass.dispatch_workgroups(groups, 1, 1);
    };
    let timing = timer.time(&record, seconds).await?;
    let [wrong, subgroups] = gpu.download_async::<u32>(&out).await?[..] else {
        return Err(Stop::Failed("multiply_squares: no result".into()));
    };
    if wrong > 0 || subgroups == 0 {
        return Err(Stop::Failed(format!("multiply_squares: {wrong} wrong of {subgroups}")));
    }
    let flops = FLOPS_OF_A_SUBGROUP * f64::from(subgroups * groups) * f64::from(side).powi(3);
    Ok(Some(flops / timing.times().least_ms / 1e6))
}
