//! The service as clients and VM processes see it: real processes, private directories, no root needed.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::*;
use main_api::Client;
use main_api::enums::*;
use main_api::idl::*;
use vbox_types::ResultCode;

/// Not a test: what runs as VBoxHeadless.
#[test]
#[ignore = "the fake VM process of the other tests"]
fn fake_vm_process() {
    fake_vm();
}

/// Not a test: connects, tells the service's pid, and stays until its standard input ends.
#[test]
#[ignore = "a client process of the other tests"]
fn client_process() {
    let Ok(config) = std::env::var("TEST_CONFIG") else { return };
    let client = Client::connect_to(config.as_ref()).unwrap();
    let session = std::env::var("TEST_LOCK").ok().map(|name| {
        let machine = client.find_machine(&name).unwrap();
        let session = client.lock_machine(&machine, LockType::Write).unwrap();
        session.machine().unwrap().write(IMachine::MemorySize, 77).unwrap();
        session
    });
    println!("connected");
    let _ = std::io::stdin().read_line(&mut String::new());
    drop(session);
}

#[test]
fn eight_clients_that_race_start_one_service() {
    let home = Home::new("race");
    let mut clients: Vec<_> = (0..8)
        .map(|_| {
            let mut command = helper("client_process");
            command.env("TEST_CONFIG", home.config()).stdin(Stdio::piped()).stdout(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for client in &mut clients {
        let mut lines = BufReader::new(client.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("connected")), "a client did not connect");
    }
    let pid = home.service_pid();
    assert_ne!(pid, 0);
    for mut client in clients {
        drop(client.stdin.take());
        assert!(client.wait().unwrap().success());
    }
    // One service wrote one log; another start would have rotated it.
    assert!(!home.config().join("VBoxSVC.log.1").exists());
    assert_eq!(home.service_pid(), pid);
}

#[test]
fn the_service_exits_some_seconds_after_its_last_client() {
    let home = Home::new("exit");
    let client = home.client();
    drop(client);
    let gone = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    // Looking connects, and so counts as a client.
    assert_ne!(home.service_pid(), 0, "the service went too early");
    let lock = home.config().join("VBoxSVC.lock");
    wait_until("the service has gone", || fs::read_to_string(&lock).unwrap().is_empty());
    assert!(gone.elapsed() >= Duration::from_secs(5));
    assert!(gone.elapsed() < Duration::from_secs(12));
    // The next client finds a new one at once.
    home.client();
}

#[test]
fn a_killed_service_is_replaced_and_nothing_is_lost() {
    let home = Home::new("kill");
    let client = home.client();
    create(&client, "m");
    home.kill_service();
    let error = client.find_machine("m").err().unwrap();
    assert!(error.is_connection_lost(), "{error:?}");
    let client = home.client();
    client.find_machine("m").unwrap();
}

#[test]
fn another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let home = Home::new("foreign");
    // A socket directory of its own, since it is opened to others for a moment.
    let mut command = helper("client_process");
    command
        .env("TEST_CONFIG", home.config())
        .env("VBOX_IPC_SOCKETID", format!("test-{}", std::process::id()));
    let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(client.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("connected")));
    let socket = fs::read_to_string(home.config().join("VBoxSVC.lock")).unwrap();
    let socket = std::path::Path::new(socket.trim());
    // Let the other user reach the socket, so that only the check of credentials stands in the way.
    let dir = socket.parent().unwrap();
    use std::os::unix::fs::PermissionsExt;
    let attempt = |uid: &str| {
        let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                      s.sendall(b'\\0AUTH EXTERNAL\\r\\n'); s.settimeout(5); print(len(s.recv(100)))";
        let mut command = std::process::Command::new("setpriv");
        command.args([
            &format!("--reuid={uid}"),
            &format!("--regid={uid}"),
            "--clear-groups",
            "python3",
            "-c",
            script,
        ]);
        let output = command.arg(socket).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
    let (own, foreign) = (attempt("0"), attempt("65534"));
    drop(client.stdin.take());
    client.wait().unwrap();
    fs::remove_dir_all(dir).unwrap();
    assert_ne!(own, "0", "the attempt itself does not work");
    // An end of file (or a reset) instead of an answer.
    assert!(foreign == "0" || foreign.is_empty(), "{foreign}");
}

#[test]
fn settings_make_the_round_trip_through_the_api_and_the_file() {
    let home = Home::new("roundtrip");
    let client = home.client();
    let machine = create(&client, "Rund & \"eckig\"");
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    let m = session.machine().unwrap();
    m.write(IMachine::MemorySize, 512).unwrap();
    m.write(IMachine::CPUCount, 4).unwrap();
    m.write(IMachine::Description, "two\nlines".to_owned()).unwrap();
    m.object(IMachine::BIOSSettings).unwrap().write(IBIOSSettings::IOAPICEnabled, true).unwrap();
    let graphics = m.object(IMachine::GraphicsAdapter).unwrap();
    graphics.write(IGraphicsAdapter::GraphicsControllerType, GraphicsControllerType::VMSVGA).unwrap();
    let adapter = m.at(m.call(IMachine::GetNetworkAdapter, (0,)).unwrap());
    adapter.write(INetworkAdapter::AdapterType, NetworkAdapterType::Virtio).unwrap();
    let nat = adapter.object(INetworkAdapter::NATEngine).unwrap();
    let rule = ("ssh".to_owned(), NATProtocol::TCP, String::new(), 2222, String::new(), 22);
    nat.call(INATEngine::AddRedirect, rule.clone()).unwrap();
    let again = nat.call(INATEngine::AddRedirect, rule).unwrap_err();
    assert_eq!(again.text, "A NAT rule of this name already exists");
    let port = m.at(m.call(IMachine::GetSerialPort, (0,)).unwrap());
    port.write(ISerialPort::Enabled, true).unwrap();
    port.write(ISerialPort::HostMode, PortMode::RawFile).unwrap();
    port.write(ISerialPort::Path, "/tmp/serial.txt".to_owned()).unwrap();
    m.call(IMachine::SetBootOrder, (1, DeviceType::DVD)).unwrap();
    m.call(IMachine::SetCPUProperty, (CPUPropertyType::PAE, false)).unwrap();
    assert!(m.read(IMachine::SettingsModified).unwrap());
    // Others see the old values until the machine is saved.
    assert_ne!(machine.read(IMachine::MemorySize).unwrap(), 512);
    m.call(IMachine::SaveSettings, ()).unwrap();
    assert!(!m.read(IMachine::SettingsModified).unwrap());
    assert_eq!(machine.read(IMachine::MemorySize).unwrap(), 512);
    drop(session);

    home.kill_service();
    let client = home.client();
    let machine = client.find_machine("Rund & \"eckig\"").unwrap();
    let tree = machine.tree().unwrap();
    let this = machine.reference();
    assert_eq!(tree.read(&this, IMachine::MemorySize).unwrap(), 512);
    assert_eq!(tree.read(&this, IMachine::CPUCount).unwrap(), 4);
    assert_eq!(tree.read(&this, IMachine::Description).unwrap(), "two\nlines");
    assert_eq!(tree.read(&this, IMachine::OSTypeId).unwrap(), "Debian_64");
    assert_eq!(tree.read(&this, IMachine::BootOrder).unwrap()[0], DeviceType::DVD);
    let bios = tree.read(&this, IMachine::BIOSSettings).unwrap();
    assert!(tree.read(&bios, IBIOSSettings::IOAPICEnabled).unwrap());
    let adapters = tree.read(&this, IMachine::NetworkAdapters).unwrap();
    assert_eq!(adapters.len(), 8);
    assert_eq!(tree.read(&adapters[0], INetworkAdapter::AdapterType).unwrap(), NetworkAdapterType::Virtio);
    assert_eq!(tree.read(&adapters[0], INetworkAdapter::MACAddress).unwrap().len(), 12);
    let nat = tree.read(&adapters[0], INetworkAdapter::NATEngine).unwrap();
    assert_eq!(tree.read(&nat, INATEngine::Redirects).unwrap(), ["ssh,1,,2222,,22"]);
    let ports = tree.read(&this, IMachine::SerialPorts).unwrap();
    assert_eq!(tree.read(&ports[0], ISerialPort::HostMode).unwrap(), PortMode::RawFile);
    assert!(!machine.call(IMachine::GetCPUProperty, (CPUPropertyType::PAE,)).unwrap());
}

#[test]
fn values_out_of_range_are_refused_in_virtualboxs_words() {
    let home = Home::new("range");
    let client = home.client();
    let machine = create(&client, "m");
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    let m = session.machine().unwrap();
    let error = m.write(IMachine::MemorySize, 3).unwrap_err();
    assert!(error.is(ResultCode::InvalidArg));
    assert_eq!(error.text, "Invalid RAM size: 3 MB (must be in range [4, 2097152] MB)");
    assert_eq!(error.details(), "code E_INVALIDARG (0x80070057), component MachineWrap, interface IMachine");
    let error = m.write(IMachine::CPUCount, 0).unwrap_err();
    assert_eq!(error.text, "Invalid virtual CPU count: 0 (must be in range [1, 64])");
    let graphics = m.object(IMachine::GraphicsAdapter).unwrap();
    let error = graphics.write(IGraphicsAdapter::VRAMSize, 257).unwrap_err();
    assert_eq!(error.text, "Invalid VRAM size: 257 MB (must be in range [0, 256] MB)");
    assert_eq!(error.interface, "IGraphicsAdapter");
    // Without a lock nothing can be written.
    let error = machine.write(IMachine::MemorySize, 64).unwrap_err();
    assert!(error.is(ResultCode::InvalidVmState));
    assert_eq!(error.text, "The machine is not mutable (state is PoweredOff)");
}

#[test]
fn a_second_writer_is_refused_and_a_shared_lock_let_in() {
    let home = Home::new("locks");
    let (one, two) = (home.client(), home.client());
    let machine = create(&one, "m");
    let session = one.lock_machine(&machine, LockType::Write).unwrap();
    let theirs = two.find_machine("m").unwrap();
    assert_eq!(theirs.read(IMachine::SessionState).unwrap(), SessionState::Locked);
    let error = two.lock_machine(&theirs, LockType::Write).err().unwrap();
    assert!(error.is(ResultCode::InvalidObjectState));
    assert_eq!(error.text, "The machine 'm' is already locked for a session (or being unlocked)");
    let shared = two.lock_machine(&theirs, LockType::Shared).unwrap();
    assert_eq!(shared.read(ISession::Type).unwrap(), SessionType::Shared);
    // What a session changed is seen by those who share its lock.
    session.machine().unwrap().write(IMachine::MemorySize, 99).unwrap();
    assert_eq!(shared.machine().unwrap().read(IMachine::MemorySize).unwrap(), 99);
    session.unlock().unwrap();
    assert_eq!(shared.state().unwrap(), SessionState::Unlocked);
    two.lock_machine(&theirs, LockType::Write).unwrap();
    // A locked machine stays registered.
    let _lock = one.lock_machine(&machine, LockType::Write).unwrap();
    let error = theirs.call(IMachine::Unregister, (CleanupMode::UnregisterOnly,)).unwrap_err();
    assert_eq!(error.text, "Cannot unregister the machine 'm' while it is locked");
}

#[test]
fn a_dead_client_loses_its_lock_and_its_changes() {
    let home = Home::new("death");
    let client = home.client();
    let machine = create(&client, "m");
    let memory = machine.read(IMachine::MemorySize).unwrap();
    let mut command = helper("client_process");
    command.env("TEST_CONFIG", home.config()).env("TEST_LOCK", "m");
    let mut other = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(other.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("connected")));
    assert_eq!(machine.read(IMachine::SessionState).unwrap(), SessionState::Locked);
    other.kill().unwrap();
    other.wait().unwrap();
    wait_until("the lock is free", || {
        machine.read(IMachine::SessionState).unwrap() == SessionState::Unlocked
    });
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    assert_eq!(session.machine().unwrap().read(IMachine::MemorySize).unwrap(), memory);
}

#[test]
fn a_vm_is_started_controlled_and_powered_off() {
    let home = Home::new("vm");
    let client = home.client();
    let machine = create(&client, "m");
    let events = home.client();
    let stream = events.events().unwrap();
    let session = start(&client, &machine);
    assert_eq!(state(&machine), MachineState::Running);
    assert_eq!(session.state().unwrap(), SessionState::Locked);
    assert_eq!(machine.read(IMachine::SessionName).unwrap(), "headless");
    assert_ne!(machine.read(IMachine::SessionPID).unwrap(), 0);
    let error = client.lock_machine(&machine, LockType::Write).err().unwrap();
    assert!(error.is(ResultCode::InvalidObjectState));

    let console = session.console().unwrap();
    assert_eq!(console.read(IConsole::State).unwrap(), MachineState::Running);
    console.call(IConsole::Pause, ()).unwrap();
    let error = console.call(IConsole::Resume, ()).unwrap_err();
    assert!(error.is(ResultCode::InvalidVmState));
    assert_eq!(error.interface, "IConsole");
    let keyboard = console.object(IConsole::Keyboard).unwrap();
    assert_eq!(keyboard.call(IKeyboard::PutScancodes, (vec![0x1e, 0x9e],)).unwrap(), 2);
    let display = console.object(IConsole::Display).unwrap();
    assert_eq!(display.call(IDisplay::GetScreenResolution, (0,)).unwrap().0, 720);
    let picture = display.call(IDisplay::TakeScreenShotToArray, (0, 0, 0, BitmapFormat::PNG)).unwrap();
    assert_eq!(picture.0.len(), 300_000);

    // While it runs, some settings can be changed and others not.
    let m = session.machine().unwrap();
    assert!(m.write(IMachine::MemorySize, 64).unwrap_err().is(ResultCode::InvalidVmState));
    m.write(IMachine::Description, "running".to_owned()).unwrap();
    m.call(IMachine::SaveSettings, ()).unwrap();
    assert_eq!(machine.read(IMachine::Description).unwrap(), "running");

    let progress = console.at(console.call(IConsole::PowerDown, ()).unwrap());
    progress.wait(|_| {}).unwrap();
    wait_until("the session is unlocked", || {
        machine.read(IMachine::SessionState).unwrap() == SessionState::Unlocked
    });
    assert_eq!(state(&machine), MachineState::PoweredOff);
    assert_eq!(session.state().unwrap(), SessionState::Unlocked);
    assert!(!home.config().join("VMs").exists());
    let states: Vec<MachineState> = stream
        .filter_map(|e| e.as_signal(IEventSource::OnMachineStateChanged))
        .map(|(_, state)| state)
        .take_while(|s| *s != MachineState::PoweredOff)
        .collect();
    assert_eq!(states, [MachineState::Starting, MachineState::Running, MachineState::Stopping]);
    // It can be started again at once.
    start(&client, &machine);
}

#[test]
fn what_happens_to_a_running_machine_is_told_to_every_client_that_listens() {
    let home = Home::new("runtime-error");
    let client = home.client();
    let (listener, deaf) = (home.client(), home.client());
    let events = listener.events().unwrap();
    let machine = create(&client, "m");
    machine.call(IMachine::SetExtraData, ("Fake/Crash".into(), "1".into())).unwrap();
    let _session = start(&client, &machine);
    let told = events.filter_map(|e| e.as_signal(IEventSource::OnRuntimeError)).next();
    let id = machine.read(IMachine::Id).unwrap();
    let text = "the fake guest has crashed".to_owned();
    assert_eq!(told, Some((id, false, main_api::runtime_error::GUEST_CRASH.to_owned(), text)));
    drop(deaf);
}

#[test]
fn cpus_of_a_running_machine_come_and_go_where_the_guest_lets_them_and_its_execution_cap_changes() {
    let home = Home::new("cpus");
    let client = home.client();
    let machine = create(&client, "m");
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    let m = session.machine().unwrap();
    m.write(IMachine::CPUCount, 4).unwrap();
    m.write(IMachine::CPUHotPlugEnabled, true).unwrap();
    m.call(IMachine::HotPlugCPU, (2,)).unwrap();
    m.call(IMachine::SaveSettings, ()).unwrap();
    session.unlock().unwrap();

    let session = start(&client, &machine);
    let m = session.machine().unwrap();
    let attached = || [0, 1, 2, 3].map(|cpu| m.call(IMachine::GetCPUStatus, (cpu,)).unwrap());
    m.call(IMachine::HotPlugCPU, (3,)).unwrap();
    assert!(m.call(IMachine::HotPlugCPU, (3,)).unwrap_err().is(ResultCode::ObjectInUse));
    assert_eq!(attached(), [true, false, true, true]);
    // The fake VM's guest keeps the third.
    assert_eq!(m.call(IMachine::HotUnplugCPU, (2,)).unwrap_err().text, "still used");
    m.call(IMachine::HotUnplugCPU, (3,)).unwrap();
    assert!(m.call(IMachine::HotUnplugCPU, (1,)).unwrap_err().is(ResultCode::ObjectNotFound));
    assert!(m.call(IMachine::HotUnplugCPU, (0,)).unwrap_err().is(ResultCode::InvalidArg));
    assert_eq!(attached(), [true, false, true, false]);
    m.write(IMachine::CPUExecutionCap, 40).unwrap();
    assert!(m.write(IMachine::CPUExecutionCap, 101).unwrap_err().is(ResultCode::InvalidArg));
    assert_eq!(m.write(IMachine::CPUExecutionCap, 1).unwrap_err().text, "no thread");
}

#[test]
fn a_vm_that_fails_to_start_tells_why() {
    let home = Home::new("fail");
    let client = home.client();
    let machine = create(&client, "m");
    machine.call(IMachine::SetExtraData, ("Fake/FailToStart".into(), "1".into())).unwrap();
    let session = client.create_session().unwrap();
    let args = (session.reference(), "headless".to_owned(), vec![]);
    let progress = machine.at(machine.call(IMachine::LaunchVMProcess, args).unwrap());
    let error = progress.wait(|_| {}).unwrap_err();
    assert_eq!(error.text, "the fake VM was told to fail");
    wait_until("the lock is free", || {
        machine.read(IMachine::SessionState).unwrap() == SessionState::Unlocked
    });
    assert_eq!(state(&machine), MachineState::PoweredOff);
}

#[test]
fn a_vm_process_that_dies_leaves_its_machine_aborted() {
    let home = Home::new("abort");
    let client = home.client();
    let machine = create(&client, "m");
    let session = start(&client, &machine);
    kill(machine.read(IMachine::SessionPID).unwrap() as i32);
    wait_until("the machine is aborted", || state(&machine) == MachineState::Aborted);
    wait_until("the lock is free", || {
        machine.read(IMachine::SessionState).unwrap() == SessionState::Unlocked
    });
    assert_eq!(session.state().unwrap(), SessionState::Unlocked);
    let file = machine.read(IMachine::SettingsFilePath).unwrap();
    assert!(fs::read_to_string(&file).unwrap().contains("aborted=\"true\""));
    // A clean run takes the mark away.
    let session = start(&client, &machine);
    let console = session.console().unwrap();
    console.at(console.call(IConsole::PowerDown, ()).unwrap()).wait(|_| {}).unwrap();
    wait_until("it is off", || state(&machine) == MachineState::PoweredOff);
    assert!(!fs::read_to_string(&file).unwrap().contains("aborted=\"true\""));
}

#[test]
fn a_running_vm_outlives_the_service_and_registers_with_the_next_one() {
    let home = Home::new("outlive");
    let client = home.client();
    let machine = create(&client, "m");
    let _session = start(&client, &machine);
    let pid = machine.read(IMachine::SessionPID).unwrap();
    home.kill_service();
    let client = home.client();
    let machine = client.find_machine("m").unwrap();
    assert_eq!(state(&machine), MachineState::Running);
    assert_eq!(machine.read(IMachine::SessionState).unwrap(), SessionState::Locked);
    assert_eq!(machine.read(IMachine::SessionPID).unwrap(), pid);
    let session = client.lock_machine(&machine, LockType::Shared).unwrap();
    let console = session.console().unwrap();
    assert_eq!(console.read(IConsole::State).unwrap(), MachineState::Running);
    console.at(console.call(IConsole::PowerDown, ()).unwrap()).wait(|_| {}).unwrap();
    wait_until("it is off", || state(&machine) == MachineState::PoweredOff);
}

#[test]
fn a_vm_that_dies_without_a_service_is_aborted_for_the_next_one() {
    let home = Home::new("both");
    let client = home.client();
    let machine = create(&client, "m");
    let _session = start(&client, &machine);
    let pid = machine.read(IMachine::SessionPID).unwrap();
    home.kill_service();
    kill(pid as i32);
    let client = home.client();
    let machine = client.find_machine("m").unwrap();
    wait_until("the machine is aborted", || state(&machine) == MachineState::Aborted);
    assert!(!home.config().join("VMs").exists());
}

#[test]
fn media_are_created_attached_locked_and_deleted_with_their_machine() {
    let home = Home::new("media");
    let client = home.client();
    let vbox = client.virtual_box();
    let (one, two) = (create(&client, "one"), create(&client, "two"));
    let disk = home.dir.join("vms/one/disk.vdi").display().to_string();
    let args = ("VDI".to_owned(), disk.clone(), AccessMode::ReadWrite, DeviceType::HardDisk);
    let medium = client.at(vbox.call(IVirtualBox::CreateMedium, args).unwrap());
    assert_eq!(medium.read(IMedium::State).unwrap(), MediumState::NotCreated);
    let created = medium.call(IMedium::CreateBaseStorage, (8 << 20, vec![MediumVariant::Standard])).unwrap();
    client.at(created).wait(|_| {}).unwrap();
    assert_eq!(medium.read(IMedium::State).unwrap(), MediumState::Created);
    assert_eq!(medium.read(IMedium::LogicalSize).unwrap(), 8 << 20);
    let iso = home.dir.join("cd.iso");
    fs::write(&iso, vec![0u8; 64 << 10]).unwrap();
    let args = (iso.display().to_string(), DeviceType::DVD, AccessMode::ReadOnly, false);
    let cd = client.at(vbox.call(IVirtualBox::OpenMedium, args).unwrap());

    for machine in [&one, &two] {
        let session = client.lock_machine(machine, LockType::Write).unwrap();
        let m = session.machine().unwrap();
        m.call(IMachine::AddStorageController, ("SATA".into(), StorageBus::SATA)).unwrap();
        m.call(IMachine::AttachDevice, ("SATA".into(), 0, 0, DeviceType::HardDisk, medium.reference()))
            .unwrap();
        m.call(IMachine::AttachDevice, ("SATA".into(), 1, 0, DeviceType::DVD, cd.reference())).unwrap();
        let again = ("SATA".into(), 1, 0, DeviceType::DVD, cd.reference());
        let error = m.call(IMachine::AttachDevice, again).unwrap_err();
        assert!(error.is(ResultCode::ObjectInUse));
        let beyond = m.call(IMachine::AttachDeviceWithoutMedium, ("SATA".into(), 30, 0, DeviceType::DVD));
        assert!(beyond.unwrap_err().is(ResultCode::InvalidArg));
        m.call(IMachine::SaveSettings, ()).unwrap();
    }
    let error = medium.call(IMedium::Close, ()).unwrap_err();
    assert!(error.is(ResultCode::ObjectInUse));
    let text = fs::read_to_string(one.read(IMachine::SettingsFilePath).unwrap()).unwrap();
    assert!(text.contains("location=\"disk.vdi\""), "{text}");

    // The disk is the running machine's alone.
    let session = start(&client, &one);
    assert_eq!(medium.read(IMedium::State).unwrap(), MediumState::LockedWrite);
    let second = client.create_session().unwrap();
    let args = (second.reference(), "headless".to_owned(), vec![]);
    let error = two.call(IMachine::LaunchVMProcess, args).unwrap_err();
    assert!(error.is(ResultCode::InvalidObjectState), "{error:?}");
    let console = session.console().unwrap();
    console.at(console.call(IConsole::PowerDown, ()).unwrap()).wait(|_| {}).unwrap();
    drop((console, session, second));

    // A restart knows the media by the machines' files.
    home.kill_service();
    let client = home.client();
    let (one, two) = (client.find_machine("one").unwrap(), client.find_machine("two").unwrap());
    let disks = client.virtual_box().read(IVirtualBox::HardDisks).unwrap();
    assert_eq!(disks.len(), 1);
    assert_eq!(client.at(disks[0].clone()).read(IMedium::Location).unwrap(), disk);

    // The disk is deleted with the last machine that has it, the CD never.
    for (machine, expected) in [(two, 0), (one, 1)] {
        let media = machine.call(IMachine::Unregister, (CleanupMode::DetachAllReturnHardDisksOnly,)).unwrap();
        assert_eq!(media.len(), expected);
        let progress = machine.at(machine.call(IMachine::DeleteConfig, (media,)).unwrap());
        progress.wait(|_| {}).unwrap();
    }
    assert!(!std::path::Path::new(&disk).exists());
    assert!(iso.exists());
    assert_eq!(fs::read_dir(home.dir.join("vms")).unwrap().count(), 0);
    assert!(client.virtual_box().read(IVirtualBox::Machines).unwrap().is_empty());
}

#[test]
fn a_medium_outlives_the_machine_in_whose_file_it_was_on_record() {
    let home = Home::new("heir");
    let client = home.client();
    let (one, two) = (create(&client, "one"), create(&client, "two"));
    let disk = home.dir.join("disk.vdi").display().to_string();
    let args = ("VDI".to_owned(), disk.clone(), AccessMode::ReadWrite, DeviceType::HardDisk);
    let medium = client.at(client.virtual_box().call(IVirtualBox::CreateMedium, args).unwrap());
    client.at(medium.call(IMedium::CreateBaseStorage, (1 << 20, vec![])).unwrap()).wait(|_| {}).unwrap();
    for machine in [&one, &two] {
        let session = client.lock_machine(machine, LockType::Write).unwrap();
        let m = session.machine().unwrap();
        m.call(IMachine::AddStorageController, ("IDE".into(), StorageBus::IDE)).unwrap();
        m.call(IMachine::AttachDevice, ("IDE".into(), 0, 0, DeviceType::HardDisk, medium.reference()))
            .unwrap();
        m.call(IMachine::SaveSettings, ()).unwrap();
    }
    let media = one.call(IMachine::Unregister, (CleanupMode::DetachAllReturnHardDisksOnly,)).unwrap();
    assert!(media.is_empty(), "a disk that another machine uses was given up for deletion");
    home.kill_service();
    let client = home.client();
    let disks = client.virtual_box().read(IVirtualBox::HardDisks).unwrap();
    assert_eq!(disks.len(), 1);
    assert_eq!(client.at(disks[0].clone()).read(IMedium::Location).unwrap(), disk);
}

#[test]
fn renaming_a_machine_takes_its_folder_and_media_along() {
    let home = Home::new("rename");
    let client = home.client();
    let machine = create(&client, "old");
    create(&client, "taken");
    let vbox = client.virtual_box();
    let disk = home.dir.join("vms/old/disk.vdi").display().to_string();
    let args = ("VDI".to_owned(), disk, AccessMode::ReadWrite, DeviceType::HardDisk);
    let medium = client.at(vbox.call(IVirtualBox::CreateMedium, args).unwrap());
    client.at(medium.call(IMedium::CreateBaseStorage, (1 << 20, vec![])).unwrap()).wait(|_| {}).unwrap();
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    let m = session.machine().unwrap();
    m.call(IMachine::AddStorageController, ("IDE".into(), StorageBus::IDE)).unwrap();
    m.call(IMachine::AttachDevice, ("IDE".into(), 0, 0, DeviceType::HardDisk, medium.reference())).unwrap();
    m.call(IMachine::SaveSettings, ()).unwrap();
    m.write(IMachine::Name, "taken".into()).unwrap();
    let error = m.call(IMachine::SaveSettings, ()).unwrap_err();
    assert!(error.text.contains("VERR_ALREADY_EXISTS"), "{error}");
    m.write(IMachine::Name, "new name".into()).unwrap();
    m.call(IMachine::SaveSettings, ()).unwrap();
    let file = home.dir.join("vms/new name/new name.vbox");
    assert_eq!(machine.read(IMachine::SettingsFilePath).unwrap(), file.display().to_string());
    let moved = home.dir.join("vms/new name/disk.vdi");
    assert_eq!(medium.read(IMedium::Location).unwrap(), moved.display().to_string());
    assert!(moved.exists() && file.exists() && !home.dir.join("vms/old").exists());
    drop(session);
    home.kill_service();
    let client = home.client();
    let machine = client.find_machine("new name").unwrap();
    assert!(machine.read(IMachine::Accessible).unwrap());
    assert!(client.find_machine("old").is_err());
}

#[test]
fn a_machine_whose_file_is_gone_is_inaccessible_and_tells_why() {
    let home = Home::new("lost");
    let client = home.client();
    let machine = create(&client, "m");
    let id = machine.read(IMachine::Id).unwrap();
    let file = machine.read(IMachine::SettingsFilePath).unwrap();
    home.kill_service();
    fs::write(&file, "<VirtualBox broken").unwrap();
    let client = home.client();
    let machines = client.virtual_box().read(IVirtualBox::Machines).unwrap();
    let many = client.read_many(&machines, &["Accessible", "Name", "Id"]).unwrap();
    assert!(!many[0].read(IMachine::Accessible).unwrap());
    assert!(many[0].read(IMachine::Name).is_err());
    assert_eq!(many[0].read(IMachine::Id).unwrap(), id);
    let machine = client.at(machines[0].clone());
    let error = machine.object(IMachine::AccessError).unwrap();
    assert!(error.read(IVirtualBoxErrorInfo::Text).unwrap().contains(&file));
    machine.call(IMachine::Unregister, (CleanupMode::UnregisterOnly,)).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "<VirtualBox broken");

    // What is mended is found again without a restart.
    let other = create(&client, "other");
    let file = other.read(IMachine::SettingsFilePath).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    home.kill_service();
    fs::write(&file, "").unwrap();
    let client = home.client();
    let machines = client.virtual_box().read(IVirtualBox::Machines).unwrap();
    let other = client.at(machines[0].clone());
    assert!(!other.read(IMachine::Accessible).unwrap());
    fs::write(&file, text).unwrap();
    assert!(other.read(IMachine::Accessible).unwrap());
    assert_eq!(other.read(IMachine::Name).unwrap(), "other");
}

#[test]
fn generic_d_bus_tools_can_introspect_every_object() {
    let home = Home::new("introspect");
    let client = home.client();
    let machine = create(&client, "m");
    let introspect = |path: &str| -> String {
        let interface = Some("org.freedesktop.DBus.Introspectable");
        let reply = client.connection().call_method(None::<()>, path, interface, "Introspect", &());
        reply.unwrap().body().deserialize().unwrap()
    };
    let xml = introspect(machine.path());
    assert!(xml.contains("<property name=\"MemorySize\" type=\"u\" access=\"readwrite\"/>"), "{xml}");
    assert!(xml.contains("<node name=\"NetworkAdapters\"/>"));
    let mut pending = vec!["/".to_owned()];
    let mut seen = 0;
    while let Some(path) = pending.pop() {
        if path.starts_with("/org/virtualbox/GuestOSTypes/") && seen > 500 {
            continue;
        }
        seen += 1;
        let xml = introspect(&path);
        let prefix = if path == "/" { "" } else { &path };
        pending.extend(xml.match_indices("<node name=\"").map(|(at, found)| {
            let rest = &xml[at + found.len()..];
            format!("{prefix}/{}", &rest[..rest.find('"').unwrap()])
        }));
    }
    assert!(seen > 50, "{seen}");
}
