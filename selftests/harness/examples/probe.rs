use virtgpu_lab::{kernel::*, vm::*};
fn main() -> anyhow::Result<()> {
    let kernel = Kernel::from_env()?;
    let mut a = std::env::args().skip(1);
    let dev = a.next().unwrap();
    let mut vm = Vm::boot(&kernel, &Machine::with_gpu(&dev), &results()?.join("probe"))?;
    for c in a {
        println!("--- {c}");
        let o = vm.try_run(&c)?;
        println!("{}{} [{}]", o.out, o.err, o.code);
    }
    Ok(())
}
