//! How fast the service is with 1,000 machines: start-up, `list vms`, and everything about one machine (`showvminfo`).
//! Milliseconds, the best of several runs. `cargo bench -p vboxsvc`.

use std::fs;
use std::time::{Duration, Instant};

use main_api::Client;
use main_api::idl::{IMachine, IVirtualBox};
use settings::{GlobalFile, GlobalSettings, MachineEntry, MachineFile, MachineSettings, OsType};
use uuid::Uuid;

const MACHINES: usize = 1000;

fn best(runs: usize, mut work: impl FnMut()) -> Duration {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

fn main() {
    let home = std::env::temp_dir().join(format!("boxwood-bench-{}", std::process::id()));
    let config = home.join("config");
    fs::create_dir_all(&config).unwrap();
    let mut global = GlobalSettings::fresh();
    for i in 0..MACHINES {
        let name = format!("machine {i}");
        let file = home.join(format!("vms/{name}/{name}.vbox"));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let machine = MachineSettings::new_for(OsType::find("Debian_64").unwrap(), &name, Uuid::new_v4());
        global.machines.push(MachineEntry { uuid: machine.uuid, settings_file: file.display().to_string() });
        MachineFile::create(&file, machine).unwrap();
    }
    GlobalFile::create(&config.join("VirtualBox.xml"), global).unwrap();

    let mut service = std::process::Command::new(env!("CARGO_BIN_EXE_VBoxSVC"));
    service.env("VBOX_USER_HOME", &config).arg("--auto-shutdown").stdout(std::process::Stdio::piped());
    let start = Instant::now();
    let mut service = service.spawn().unwrap();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(service.stdout.take().unwrap()),
        &mut String::new(),
    )
    .unwrap();
    println!("start with {MACHINES} machines     {:8.1} ms", start.elapsed().as_secs_f64() * 1e3);

    let connect = best(20, || drop(Client::connect_if_running(&config).unwrap()));
    println!("connect                        {:8.2} ms", connect.as_secs_f64() * 1e3);
    let list = best(10, || {
        let client = Client::connect_if_running(&config).unwrap();
        let machines = client.virtual_box().read(IVirtualBox::Machines).unwrap();
        let rows = client.read_many(&machines, &["Accessible", "Name", "Id"]).unwrap();
        let names: Vec<String> = rows.iter().map(|r| r.read(IMachine::Name).unwrap()).collect();
        assert_eq!(names.len(), MACHINES);
    });
    println!("connect, list all machines     {:8.2} ms", list.as_secs_f64() * 1e3);
    let tree = best(20, || {
        let client = Client::connect_if_running(&config).unwrap();
        let machine = client.find_machine("machine 500").unwrap();
        let tree = machine.tree().unwrap();
        assert!(tree.read(&machine.reference(), IMachine::MemorySize).unwrap() > 0);
    });
    println!("connect, all of one machine    {:8.2} ms", tree.as_secs_f64() * 1e3);
    service.kill().unwrap();
    service.wait().unwrap();
    fs::remove_dir_all(&home).unwrap();
}
