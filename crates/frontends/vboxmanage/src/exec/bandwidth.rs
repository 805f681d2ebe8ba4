//! `bandwidthctl`.

use main_api::idl::{IBandwidthControl, IBandwidthGroup, IMachine};

use main_api::{ApiResult, Proxy};

use super::{Context, Done, Run};
use crate::parse::bandwidth::{Action, BandwidthCtl};
use crate::print::vminfo::{BandwidthGroup, bandwidth_line};

impl Run<'_> {
    fn bandwidth_groups(&self, machine: &Proxy<IMachine>) -> ApiResult<Vec<BandwidthGroup>> {
        let control = machine.object(IMachine::BandwidthControl)?;
        let groups = control.call(IBandwidthControl::GetAllBandwidthGroups, ())?;
        let read = |group| {
            let group = self.client.at(group);
            Ok(BandwidthGroup {
                name: group.read(IBandwidthGroup::Name)?,
                kind: group.read(IBandwidthGroup::Type)?,
                max_bytes_per_second: group.read(IBandwidthGroup::MaxBytesPerSec)?,
            })
        };
        groups.into_iter().map(read).collect()
    }

    pub(super) fn bandwidth_ctl(&mut self, request: BandwidthCtl) -> Done {
        let BandwidthCtl { vm, action } = request;
        if let Action::List { machine_readable } = action {
            let groups = self
                .bandwidth_groups(&self.find(&vm)?)
                .context(|| "GetAllBandwidthGroups(ComSafeArrayAsOutParam(bwGroups))".to_owned())?;
            if groups.is_empty() && !machine_readable {
                return self.print("<none>\n");
            }
            let line = |(i, group)| bandwidth_line(i, group, machine_readable) + "\n";
            return self.print(&groups.iter().enumerate().map(line).collect::<String>());
        }
        let (session, machine) = self.shared(&vm)?;
        let control = machine
            .object(IMachine::BandwidthControl)
            .context(|| "COMGETTER(BandwidthControl)(bwCtrl.asOutParam())".to_owned())?;
        match action {
            Action::Add { name, kind, limit } => control
                .call(IBandwidthControl::CreateBandwidthGroup, (name.clone(), kind, limit))
                .context(|| {
                    format!("CreateBandwidthGroup(name.raw(), enmType, (LONG64)cMaxBytesPerSec) for {name}")
                })?,
            Action::Set { name, limit } => {
                let group = control
                    .call(IBandwidthControl::GetBandwidthGroup, (name.clone(),))
                    .context(|| format!("GetBandwidthGroup(name.raw(), bwGroup.asOutParam()) for {name}"))?;
                self.client
                    .at(group)
                    .write(IBandwidthGroup::MaxBytesPerSec, limit)
                    .context(|| "COMSETTER(MaxBytesPerSec)((LONG64)cMaxBytesPerSec)".to_owned())?;
            }
            Action::Remove { name } => control
                .call(IBandwidthControl::DeleteBandwidthGroup, (name.clone(),))
                .context(|| format!("DeleteBandwidthGroup(name.raw()) for {name}"))?,
            Action::List { .. } => {}
        }
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        session.unlock().context(|| "UnlockMachine()".to_owned())
    }
}
