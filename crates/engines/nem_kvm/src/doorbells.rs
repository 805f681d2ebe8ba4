//! Doorbells that KVM hears: it counts a write on an event ("ioeventfd") and lets the guest go on; a thread of the VM's tells the device.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use pdm::doorbell::{BellId, Doorbell};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::sys;

/// Events that one turn of the thread takes.
const TURN: usize = 16;
/// In the place of a doorbell's number: the thread is to end.
const END: u64 = u64::MAX;

struct Up {
    event: OwnedFd,
    doorbell: Doorbell,
    /// KVM counts no more; the thread forgets it when it has told the device what was counted.
    down: bool,
}

/// What the thread works on.
struct Shared {
    events: OwnedFd,
    end: OwnedFd,
    up: Mutex<BTreeMap<u64, Up>>,
}

/// The doorbells of one VM that KVM hears. The thread ends with it, after it has told devices what KVM has counted.
pub(crate) struct Listener {
    shared: Arc<Shared>,
    started: Mutex<bool>,
}

fn new_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Every write to `event` is told once: the count need not be read.
fn listen(events: &OwnedFd, event: &OwnedFd, number: u64) -> io::Result<()> {
    Ok(epoll::add(events, event, EventData::new_u64(number), EventFlags::IN | EventFlags::ET)?)
}

fn signal(event: &OwnedFd) {
    // Fails only if it is counted already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Listener {
    pub(crate) fn new() -> io::Result<Self> {
        let shared =
            Shared { events: epoll::create(CreateFlags::CLOEXEC)?, end: new_event()?, up: Mutex::default() };
        listen(&shared.events, &shared.end, END)?;
        Ok(Self { shared: Arc::new(shared), started: Mutex::new(false) })
    }

    /// Has KVM hear the doorbell. If that fails its writes go on to be exits.
    pub(crate) fn put_up(&self, vm: &VmFd, id: BellId, doorbell: &Doorbell) {
        let hear = |event: BorrowedFd<'_>| sys::set_ioevent(vm, event, doorbell.place, true);
        if let Err(error) = self.try_put_up(id, doorbell, hear) {
            // Guests can lay one device over another.
            tracing::debug!(target: "nem", "KVM does not hear the doorbell at {:?}: {error}", doorbell.place);
        }
    }

    fn try_put_up(
        &self,
        id: BellId,
        doorbell: &Doorbell,
        hear: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut started = self.started.lock();
        if !*started {
            let shared = self.shared.clone();
            std::thread::Builder::new().name("nem-bells".into()).spawn(move || shared.run())?;
            *started = true;
        }
        let event = new_event()?;
        listen(&self.shared.events, &event, id.0)?;
        // The thread waits for the entry.
        let mut up = self.shared.up.lock();
        hear(event.as_fd())?;
        up.insert(id.0, Up { event, doorbell: doorbell.clone(), down: false });
        Ok(())
    }

    pub(crate) fn take_down(&self, vm: &VmFd, id: BellId) {
        self.forget(id, |event, doorbell| sys::set_ioevent(vm, event, doorbell.place, false));
    }

    fn forget(&self, id: BellId, ignore: impl FnOnce(BorrowedFd<'_>, &Doorbell) -> io::Result<()>) {
        let mut up = self.shared.up.lock();
        let Some(Up { event, doorbell, down }) = up.get_mut(&id.0) else { return };
        if let Err(error) = ignore(event.as_fd(), doorbell) {
            tracing::debug!(target: "nem", "KVM goes on to hear the doorbell at {:?}: {error}", doorbell.place);
        }
        *down = true;
        signal(event);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        signal(&self.shared.end);
    }
}

impl Shared {
    fn run(&self) {
        let mut list = Vec::with_capacity(TURN);
        let mut ended = false;
        loop {
            list.clear();
            let patience = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(
                &self.events,
                rustix::buffer::spare_capacity(&mut list),
                ended.then_some(&patience),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(target: "nem", "nobody hears the guest's doorbells any more: {error}");
                    return;
                }
            }
            if ended && list.is_empty() {
                return;
            }
            for number in list.iter().map(|event| event.data.u64()) {
                match number {
                    END => ended = true,
                    _ => self.tell(number),
                }
            }
        }
    }

    fn tell(&self, number: u64) {
        let mut up = self.up.lock();
        let Some(Up { doorbell, down, .. }) = up.get(&number) else { return };
        let Doorbell { device, number: which, .. } = doorbell;
        let (device, which) = (Weak::upgrade(device), *which);
        if *down {
            up.remove(&number);
        }
        drop(up);
        if let Some(device) = device {
            device.rung(which);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use pdm::doorbell::{Bell, BellDevice, Place};
    use vbox_types::GuestPhys;

    use super::*;

    struct Device(Sender<u16>);
    impl BellDevice for Device {
        fn rung(&mut self, number: u16) {
            self.0.send(number).unwrap();
        }
    }

    #[test]
    fn what_was_rung_reaches_the_device_also_when_the_doorbell_goes_or_the_engine_does() {
        const PATIENCE: Duration = Duration::from_secs(20);
        let (told, heard) = channel();
        let device: Arc<dyn Bell> = Arc::new(Mutex::new(Device(told)));
        let listener = Listener::new().unwrap();
        let shared = Arc::downgrade(&listener.shared);
        let mut events = Vec::new();
        for number in 0..3 {
            let place = Place::Memory(GuestPhys(0x1000 + 4 * u64::from(number)));
            let doorbell = Doorbell { place, number, device: Arc::downgrade(&device), gate: None };
            let hear = |event: BorrowedFd<'_>| {
                events.push(event.try_clone_to_owned()?);
                Ok(())
            };
            listener.try_put_up(BellId(number.into()), &doorbell, hear).unwrap();
        }
        for _ in 0..2 {
            signal(&events[1]);
            assert_eq!(heard.recv_timeout(PATIENCE), Ok(1));
        }
        // Rung just before it goes.
        listener.forget(BellId(0), |_, _| {
            signal(&events[0]);
            Ok(())
        });
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(0));
        signal(&events[2]);
        drop(listener);
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(2));
        for _ in 0..2000 {
            if shared.strong_count() == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the thread did not end");
    }
}
