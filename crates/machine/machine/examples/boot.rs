//! Boots an ISO image without service and settings, for work on devices and engines: first serial port on standard output.
//!
//!     cargo run --release -p machine --example boot -- IMAGE.iso [--cpus N] [--memory MIB] [--hpet] [--disk IMAGE]
//!         [--virtio IMAGE] [--ahci | --scsi lsilogic|sas|buslogic|virtio] [--screen FILE.png] [--seconds N] [--no-ioapic] [--interpreter | --kvm]
//!         [--switch MS] [--paravirt kvm|hyperv|minimal]
//!
//! `--ahci` attaches the drives to an AHCI controller instead of an IDE controller, `--scsi` to a SCSI controller; `--virtio` adds a virtio disk. `--switch` has the recompiler and the first
//! engine take turns, for about so long each. `--screen` writes a screenshot once a second; `--seconds` powers off after that time. Statistics come at the end, on
//! standard error. BOXWOOD_LOG=debug and so on chooses what is logged, to standard error.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use em::{MachineHooks, RunState};
use machine::config::{
    DriveConfig, DriveKind, IdeModel, MachineConfig, MediumConfig, PortsConfig, ScsiConfig, ScsiModel,
    UartConfig, UartMode,
};
use machine::machine::Machine;
use uuid::Uuid;
use vbox_types::{ByteSize, Port};

struct Hooks(Arc<Machine>);

impl MachineHooks for Hooks {
    fn reset_devices(&self) {
        self.0.reset_devices();
    }

    fn state_changed(&self, state: RunState, why: Option<&str>) {
        eprintln!("[{state:?}] {}", why.unwrap_or_default());
        if state == RunState::Stuck {
            self.0.em().power_off();
        }
    }
}

fn drive(kind: DriveKind, path: PathBuf, port: u8) -> DriveConfig {
    let medium = MediumConfig {
        path,
        format: if kind == DriveKind::Dvd { "RAW".into() } else { String::new() },
        read_only: kind == DriveKind::Dvd,
        parents: Vec::new(),
        target: None,
        shareable: false,
        host_cache: true,
        uuid: Uuid::nil(),
        encryption: None,
    };
    DriveConfig {
        kind,
        controller: String::new(),
        port,
        device: 0,
        medium: Some(medium),
        non_rotational: false,
        discard: false,
        hot_pluggable: false,
        bootable: true,
        bandwidth_group: String::new(),
    }
}

fn main() -> Result<()> {
    let filter: tracing_subscriber::filter::Targets =
        std::env::var("BOXWOOD_LOG").unwrap_or_else(|_| "info".into()).parse()?;
    use tracing_subscriber::layer::{Layer, SubscriberExt};
    let layer =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time().with_filter(filter);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))?;

    let mut config = MachineConfig::bare("boot", ByteSize::mib(512));
    let (mut drives, mut screen, mut limit) = (Vec::new(), None, None);
    let (mut ahci, mut scsi, mut switch, mut virtio) = (false, None, None, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--cpus" => config.cpus = value()?.parse()?,
            "--memory" => config.ram = ByteSize::mib(value()?.parse()?),
            "--hpet" => config.hpet = true,
            "--no-ioapic" => config.ioapic = false,
            "--interpreter" => config.engine = machine::config::EngineChoice::Interpreter,
            "--switch" => switch = Some(Duration::from_millis(value()?.parse()?)),
            "--kvm" => config.engine = machine::config::EngineChoice::Kvm,
            "--paravirt" => {
                config.paravirt = match value()?.as_str() {
                    "kvm" => gim::Provider::Kvm,
                    "hyperv" => gim::Provider::HyperV,
                    "minimal" => gim::Provider::Minimal,
                    _ => gim::Provider::None,
                }
            }
            "--ahci" => ahci = true,
            "--scsi" => {
                scsi = Some(match value()?.as_str() {
                    "sas" => ScsiModel::LsiLogicSas,
                    "virtio" => ScsiModel::Virtio,
                    "buslogic" => ScsiModel::BusLogic,
                    _ => ScsiModel::LsiLogic,
                });
            }
            "--virtio" => virtio.push(drive(DriveKind::Disk, value()?.into(), 0)),
            "--disk" => drives.push(drive(DriveKind::Disk, value()?.into(), 0)),
            "--screen" => screen = Some(value()?),
            "--seconds" => limit = Some(Duration::from_secs(value()?.parse()?)),
            _ => drives.push(drive(DriveKind::Dvd, arg.into(), 1)),
        }
    }
    if let Some(model) = scsi {
        config.scsi.push(ScsiConfig { model, ports: 8, drives });
    } else if ahci {
        config.ahci = Some(PortsConfig { ports: 2, drives });
    } else {
        config.ide = Some((IdeModel::Piix4, drives));
    }
    if !virtio.is_empty() {
        config.virtio_blk = Some(PortsConfig { ports: 1, drives: virtio });
    }
    config.uarts.push(UartConfig {
        io_base: Port(0x3f8),
        irq: 4,
        mode: UartMode::File("/dev/stdout".into()),
    });

    let machine = Machine::build(&config)?;
    let started = Instant::now();
    machine.em().power_on(Arc::new(Hooks(machine.clone())))?;
    machine.em().resume();
    let watcher = machine.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            if let Some(path) = &screen
                && let Ok(png) = machine::screenshot::png(&watcher.frame(), 0, 0)
            {
                let _ = std::fs::write(path, png);
            }
            if limit.is_some_and(|limit| started.elapsed() > limit) {
                watcher.em().power_off();
            }
        }
    });
    if let Some(pause) = switch {
        let switched = machine.clone();
        std::thread::spawn(move || {
            let engines = [machine::engine::Kind::Recompiler, switched.engine()];
            for (round, kind) in engines.into_iter().cycle().enumerate() {
                // Not in step with anything.
                std::thread::sleep(pause / 2 + pause * (round as u32 * 37 % 64) / 64);
                if switched.em().state() == RunState::PoweredOff {
                    return;
                }
                if let Err(error) = switched.change_engine(kind) {
                    eprintln!("the engine was not changed: {error:#}");
                    return;
                }
            }
        });
    }
    machine.em().wait_for_power_off();
    machine.close()?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{seconds:.1} s");
    for machine::stam::Sample { name, value, .. } in machine.statistics() {
        eprintln!("{name} {value}  ({:.3} M/s)", value as f64 / seconds / 1e6);
    }
    Ok(())
}
