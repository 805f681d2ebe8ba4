//! The host's CPU as executor.
//!
//! Registers go in and come out through signal frames: a signal's handler swaps the interrupted context for the sequence's, and
//! the handler of the trap that ends the sequence swaps it back. No assembly, and the kernel reports vector, error code and fault address.
#![allow(unsafe_code)] // signal handlers and mappings at fixed addresses

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard};

use cpum::state::{XsaveArea, rflags};

use super::{CODE, CODE_LEN, DATA, DATA_LEN, Outcome, State, TABLE_LEN, Trap};

/// Largest signal frame state that is expected: AVX-512 and AMX.
const FRAME_MAX: usize = 16 << 10;
const SIGNALS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGBUS, libc::SIGUSR2];

/// Register order of `CpuState` in the kernel's.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// What handlers exchange with `run`.
struct Exchange {
    state: State,
    trap: Trap,
    /// The context that `run` was called in.
    host: libc::mcontext_t,
    host_fp: [u8; FRAME_MAX],
    host_fp_len: usize,
    in_sequence: bool,
}

/// Set while a sequence runs: the handlers' only way to the data.
static CURRENT: AtomicPtr<Exchange> = AtomicPtr::new(std::ptr::null_mut());
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The host side of the test. One exists at a time, for the whole process.
pub struct Native {
    exchange: Box<UnsafeCell<Exchange>>,
    code: *mut u8,
    old: Vec<(i32, libc::sigaction)>,
    stack: Vec<u8>,
    _alone: MutexGuard<'static, ()>,
}

impl Native {
    pub fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: maps fresh memory at addresses that nothing uses (NOREPLACE fails otherwise); handlers have the right signature.
        unsafe {
            map(DATA, DATA_LEN + TABLE_LEN, libc::PROT_READ | libc::PROT_WRITE, -1);
            let fd = libc::memfd_create(c"differential".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0 && libc::ftruncate(fd, CODE_LEN as libc::off_t) == 0);
            map(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_EXEC, fd);
            let code = libc::mmap(
                std::ptr::null_mut(),
                CODE_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            );
            assert_ne!(code, libc::MAP_FAILED);
            libc::close(fd);
            let stack = vec![0u8; 128 << 10];
            let alternate =
                libc::stack_t { ss_sp: stack.as_ptr() as *mut c_void, ss_flags: 0, ss_size: stack.len() };
            assert_eq!(libc::sigaltstack(&alternate, std::ptr::null_mut()), 0);
            let mut old = Vec::new();
            for signal in SIGNALS {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut before: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                assert_eq!(libc::sigaction(signal, &action, &mut before), 0);
                old.push((signal, before));
            }
            Self {
                exchange: Box::new(UnsafeCell::new(Exchange {
                    state: State { gpr: [0; 16], rip: 0, rflags: 0, xsave: XsaveArea::reset() },
                    trap: Trap { vector: 0, code: 0, address: 0 },
                    host: std::mem::zeroed(),
                    host_fp: [0; FRAME_MAX],
                    host_fp_len: 0,
                    in_sequence: false,
                })),
                code: code.cast(),
                old,
                stack,
                _alone: alone,
            }
        }
    }

    /// Loads code, data and registers, runs until a trap, and returns what was left.
    pub fn run(&mut self, start: &State, code: &[u8], data: &[u8], table: &[u8]) -> Outcome {
        assert!(code.len() <= CODE_LEN && data.len() == DATA_LEN && table.len() == TABLE_LEN);
        let exchange = self.exchange.get();
        // SAFETY: the mappings have these sizes; only this thread runs sequences (the guard), and the handlers touch the exchange
        // only between `tgkill` and its return. Sequences are generated to leave everything but the data and registers alone.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.code, code.len());
            std::ptr::copy_nonoverlapping(data.as_ptr(), DATA as *mut u8, DATA_LEN);
            std::ptr::copy_nonoverlapping(table.as_ptr(), (DATA as usize + DATA_LEN) as *mut u8, TABLE_LEN);
            (*exchange).state = start.clone();
            (*exchange).in_sequence = false;
            CURRENT.store(exchange, Ordering::SeqCst);
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGUSR2);
            CURRENT.store(std::ptr::null_mut(), Ordering::SeqCst);
            let mut out = vec![0; DATA_LEN];
            std::ptr::copy_nonoverlapping(DATA as *const u8, out.as_mut_ptr(), DATA_LEN);
            Outcome { state: (*exchange).state.clone(), trap: (*exchange).trap, data: out }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: restores what `new` replaced and unmaps what it mapped.
        unsafe {
            for (signal, action) in &self.old {
                libc::sigaction(*signal, action, std::ptr::null_mut());
            }
            let off = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&off, std::ptr::null_mut());
            libc::munmap(self.code.cast(), CODE_LEN);
            libc::munmap(CODE as *mut c_void, CODE_LEN);
            libc::munmap(DATA as *mut c_void, DATA_LEN + TABLE_LEN);
        }
    }
}

/// # Safety
/// The caller unmaps it.
unsafe fn map(at: u64, len: usize, protection: i32, fd: i32) {
    let kind = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: NOREPLACE never hits an existing mapping.
    let got = unsafe {
        libc::mmap(
            at as *mut c_void,
            len,
            protection,
            kind | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
            fd,
            0,
        )
    };
    assert_eq!(got as u64, at, "address {at:#x} is taken");
}

extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut c_void) {
    let current = CURRENT.load(Ordering::SeqCst);
    // SAFETY: the kernel passes a valid context; the exchange is valid while CURRENT is set, and its owner waits in `tgkill`.
    unsafe {
        if current.is_null() {
            // A genuine crash: let it happen.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let exchange = &mut *current;
        let context = &mut *context.cast::<libc::ucontext_t>();
        if exchange.in_sequence { leave(exchange, context) } else { enter(exchange, context) }
    }
}

/// # Safety
/// `context` is a signal frame with extended state.
unsafe fn enter(exchange: &mut Exchange, context: &mut libc::ucontext_t) {
    exchange.host = context.uc_mcontext;
    let fp = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: the frame's software bytes (464 to 511) tell the state's length, which is checked against the room for it.
    unsafe {
        let magic = fp.add(464).cast::<u32>().read_unaligned();
        assert_eq!(magic, 0x4650_5853, "no extended state in the signal frame");
        let len = fp.add(468).cast::<u32>().read_unaligned() as usize;
        assert!(len <= FRAME_MAX);
        exchange.host_fp_len = len;
        std::ptr::copy_nonoverlapping(fp, exchange.host_fp.as_mut_ptr(), len);
        let state = &exchange.state;
        let mask = fp.add(28).cast::<u32>().read_unaligned();
        std::ptr::copy_nonoverlapping(state.xsave.0.as_ptr(), fp, 416);
        fp.add(28).cast::<u32>().write_unaligned(mask);
        fp.add(512).cast::<u64>().write_unaligned(7);
        std::ptr::copy_nonoverlapping(state.xsave.0.as_ptr().add(576), fp.add(576), 256);
    }
    let registers = &mut context.uc_mcontext.gregs;
    for (i, &register) in ORDER.iter().enumerate() {
        registers[register as usize] = exchange.state.gpr[i] as i64;
    }
    registers[libc::REG_RIP as usize] = exchange.state.rip as i64;
    registers[libc::REG_EFL as usize] =
        (exchange.state.rflags & (rflags::ARITH | rflags::DF) | rflags::FIXED | rflags::IF) as i64;
    exchange.in_sequence = true;
}

/// # Safety
/// As [`enter`].
unsafe fn leave(exchange: &mut Exchange, context: &mut libc::ucontext_t) {
    let registers = &context.uc_mcontext.gregs;
    let state = &mut exchange.state;
    for (i, &register) in ORDER.iter().enumerate() {
        state.gpr[i] = registers[register as usize] as u64;
    }
    state.rip = registers[libc::REG_RIP as usize] as u64;
    state.rflags = registers[libc::REG_EFL as usize] as u64;
    exchange.trap = Trap {
        vector: registers[libc::REG_TRAPNO as usize] as u8,
        code: registers[libc::REG_ERR as usize] as u32,
        address: registers[libc::REG_CR2 as usize] as u64,
    };
    let fp = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: as in `enter`; the frame of the same thread has the same layout.
    unsafe {
        let initial = XsaveArea::reset();
        let present = fp.add(512).cast::<u64>().read_unaligned();
        let source =
            |component: u64| if present & component != 0 { fp } else { initial.0.as_ptr().cast_mut() };
        let area = state.xsave.0.as_mut_ptr();
        for (component, start, end) in [(1, 0, 24), (1, 32, 160), (2, 160, 416), (4, 576, 832)] {
            std::ptr::copy_nonoverlapping(source(component).add(start), area.add(start), end - start);
        }
        // MXCSR is there even if the SSE registers are not.
        std::ptr::copy_nonoverlapping(fp.add(24), area.add(24), 4);
        context.uc_mcontext.gregs = exchange.host.gregs;
        std::ptr::copy_nonoverlapping(exchange.host_fp.as_ptr(), fp, exchange.host_fp_len);
    }
    exchange.in_sequence = false;
}
