//! Prints what the parts of the engines cost, on guest programs without devices.
//!
//! `cargo run --release -p conformance --example engine_bench -- [--engines A,B…] [--scale N] [--only TEXT]`. A larger scale runs each
//! program longer.

use std::process::ExitCode;

use conformance::Kind;
use conformance::kernels::KERNELS;

fn main() -> ExitCode {
    let (mut engines, mut scale, mut only) = (Kind::ALL.to_vec(), 4u32, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        let understood = match option.as_str() {
            "--engines" => value.split(',').map(Kind::parse).collect::<Option<Vec<_>>>().map(|e| engines = e),
            "--scale" => value.parse().ok().map(|n: u32| scale = n.clamp(1, 100)),
            "--only" => {
                only.clone_from(&value);
                Some(())
            }
            _ => None,
        };
        if understood.is_none() {
            eprintln!("unknown option or value: {option} {value}");
            return ExitCode::from(2);
        }
    }
    print!("{:44}", "");
    for engine in &engines {
        print!("{:>14}", format!("{engine:?}").to_lowercase());
    }
    println!();
    for kernel in KERNELS.iter().filter(|k| k.name.contains(&only)) {
        print!("{:44}", kernel.name);
        for engine in &engines {
            print!("{:14.1}", (kernel.run)(*engine, scale));
        }
        println!("  {}", kernel.unit.name());
    }
    ExitCode::SUCCESS
}
