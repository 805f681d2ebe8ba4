//! `debugvm`.

use main_api::enums::LockType;
use main_api::idl::*;

use super::{Context, Done, Failure, Run, not_available};
use crate::parse::debug::{Action, DebugVm};

impl Run<'_> {
    pub(super) fn debug_vm(&mut self, request: DebugVm) -> Done {
        let machine = self.find(&request.vm)?;
        if let Action::Unavailable(word) = request.action {
            return Err(not_available(&format!("The command 'debugvm {word}'")));
        }
        let state = machine.read(IMachine::State).context(|| "COMGETTER(State)".to_owned())?;
        if !state.is_online() {
            return Err(Failure::Text(format!("Machine '{}' is not currently running.\n", request.vm)));
        }
        let session = self
            .client
            .lock_machine(&machine, LockType::Shared)
            .context(|| "LockMachine(pArgs->session, LockType_Shared)".to_owned())?;
        let console =
            session.console().context(|| "COMGETTER(Console)(ptrConsole.asOutParam())".to_owned())?;
        let debugger = console
            .object(IConsole::Debugger)
            .context(|| "COMGETTER(Debugger)(ptrDebugger.asOutParam())".to_owned())?;
        match request.action {
            Action::Statistics { reset: true, pattern, .. } => debugger
                .call(IMachineDebugger::ResetStats, (pattern,))
                .context(|| "ResetStats(bstrPattern.raw())".to_owned()),
            Action::Statistics { descriptions, pattern, .. } => {
                let text = debugger
                    .call(IMachineDebugger::GetStats, (pattern, descriptions))
                    .context(|| "GetStats()".to_owned())?;
                self.print(&format!("{text}\n"))
            }
            Action::GetRegisters { cpu, names } => {
                for name in names {
                    let text = if name.eq_ignore_ascii_case("all") {
                        let (names, values) = debugger
                            .call(IMachineDebugger::GetRegisters, (cpu,))
                            .context(|| "GetRegisters()".to_owned())?;
                        let width = names.iter().map(String::len).max().unwrap_or(0).max(8);
                        names.iter().zip(values).map(|(n, v)| format!("{n:width$} = {v}\n")).collect()
                    } else {
                        let value = debugger
                            .call(IMachineDebugger::GetRegister, (cpu, name.clone()))
                            .context(|| "GetRegister()".to_owned())?;
                        format!("{name} = {value}\n")
                    };
                    self.print(&text)?;
                }
                Ok(())
            }
            Action::SetRegisters { cpu, values } => {
                if let [(name, value)] = values.as_slice() {
                    debugger
                        .call(IMachineDebugger::SetRegister, (cpu, name.clone(), value.clone()))
                        .context(|| "SetRegister()".to_owned())?;
                    return self.print(&format!("Successfully set {name}\n"));
                }
                let count = values.len();
                debugger
                    .call(IMachineDebugger::SetRegisters, {
                        let (names, values) = values.into_iter().unzip();
                        (cpu, names, values)
                    })
                    .context(|| "SetRegisters()".to_owned())?;
                self.print(&format!("Successfully set {count} registers\n"))
            }
            Action::Info { name, args } => {
                let text =
                    debugger.call(IMachineDebugger::Info, (name, args)).context(|| "Info()".to_owned())?;
                self.print(&text)
            }
            Action::InjectNmi => {
                debugger.call(IMachineDebugger::InjectNMI, ()).context(|| "InjectNMI()".to_owned())
            }
            Action::Unavailable(_) => Ok(()),
        }
    }
}
