//! The encryption of media: IMedium's methods for it, and what is on record.
//!
//! The base medium of a chain has the key store and the id of its password among its properties, as VirtualBox writes them; all
//! media of the chain are encrypted with that key.
//!
//! **A change survives being killed at any moment.** The media are not touched: their files are made anew, encrypted otherwise, in
//! a folder beside each ([`vd::Recrypted`]). When all are there and durable, the settings file gets a *note* with the new key store;
//! then the new files take the places of the old ones, each folder turning into a mark of that; then the settings file gets the new
//! key store in the place of the old one and of the note. Whoever loads a settings file with a note ([`finish_switches`]) finds
//! folders or marks and completes the switch, or finds neither and forgets the note: then the switch had not begun, and the media
//! and their key are the old ones. So there is no moment without the key for what the files hold.

use std::collections::BTreeMap;
use std::path::PathBuf;

use main_api::error::{ApiError, ApiResult};
use main_api::idl::{IMedium, IProgress};
use main_api::progress::Progress;
use main_api::server::CallTable;
use main_api::types::ObjRef;
use settings::DriveType;
use uuid::Uuid;
use vbox_types::ResultCode;
use vd::{Algorithm, Dek, KeyStore, KeyStoreError, Recrypted};

use crate::calls::save_registries;
use crate::calls_media::{failed, own, run};
use crate::machines::users_of;
use crate::media::{MediaPool, Medium, Task};
use crate::svc::{Context, Svc};

/// The properties of the base medium, VirtualBox's.
const KEY_STORE: &str = "CRYPT/KeyStore";
const KEY_ID: &str = "CRYPT/KeyId";
/// The note of a switch: that there is one, and what the two properties become by it.
const NOTE: &str = "Boxwood/EncryptionSwitch";
const NEW_KEY_STORE: &str = "Boxwood/NewKeyStore";
const NEW_KEY_ID: &str = "Boxwood/NewKeyId";

pub(crate) fn add(t: &mut CallTable<Context>) {
    t.add(IMedium::ChangeEncryption, |c, (current, cipher, new, new_id)| {
        change(c, Wanted { current, cipher, new, new_id })
    })
    .add(IMedium::GetEncryptionSettings, |c, ()| {
        let id = own(c)?;
        let state = c.svc.state.lock();
        let Some((store, key_id)) = settings(&state.media, id) else { return Err(not_encrypted()) };
        let store = KeyStore::decode(&store).map_err(|e| bad_store(&e))?;
        Ok((store.algorithm().name().to_owned(), key_id))
    })
    .add(IMedium::CheckEncryptionPassword, |c, (password,)| {
        let id = own(c)?;
        let found = settings(&c.svc.state.lock().media, id);
        let Some((store, _)) = found else { return Err(not_encrypted()) };
        if password.is_empty() {
            return Err(ApiError::invalid_arg("The given password must not be empty"));
        }
        unlock(&store, &password, "The given password is incorrect").map(drop)
    });
}

fn error(code: ResultCode, text: impl Into<String>) -> ApiError {
    ApiError::new(code, text.into()).on("IMedium")
}

fn not_encrypted() -> ApiError {
    error(ResultCode::NotSupported, "The image is not configured for encryption")
}

fn bad_store(why: &KeyStoreError) -> ApiError {
    error(ResultCode::InvalidObjectState, format!("Failed to load the encryption filter: {why}"))
}

fn unlock(store: &str, password: &str, wrong: &str) -> ApiResult<Dek> {
    let store = KeyStore::decode(store).map_err(|e| bad_store(&e))?;
    store.unlock(password).map_err(|e| match e {
        KeyStoreError::WrongPassword => error(ResultCode::PasswordIncorrect, wrong),
        other => bad_store(&other),
    })
}

fn base(media: &MediaPool, id: Uuid) -> Option<&Medium> {
    media.find(*media.chain(id).ok()?.first()?)
}

/// The key store of an encrypted medium, and its password's id.
pub(crate) fn settings(media: &MediaPool, id: Uuid) -> Option<(String, String)> {
    let properties = &base(media, id)?.properties;
    let store = properties.get(KEY_STORE)?;
    Some((store.clone(), properties.get(KEY_ID).cloned().unwrap_or_default()))
}

/// The key of a medium for an export, which decrypts it: what the media registry and the client have of it.
pub(crate) struct Locked {
    location: String,
    store: String,
    password: String,
}

impl Locked {
    /// `None` if the medium is not encrypted.
    pub(crate) fn of(
        media: &MediaPool,
        id: Uuid,
        passwords: &BTreeMap<String, String>,
    ) -> ApiResult<Option<Self>> {
        let Some((store, key_id)) = settings(media, id) else { return Ok(None) };
        check(media, id)?;
        let location = media.medium(id)?.location.display().to_string();
        let password = passwords.get(&key_id).cloned().ok_or_else(|| {
            let text =
                format!("The encrypted medium '{location}' is exported decrypted, for which its password is needed (password ID '{key_id}')");
            error(ResultCode::InvalidObjectState, text)
        })?;
        Ok(Some(Self { location, store, password }))
    }

    /// The key itself. Takes its time.
    pub(crate) fn unlock(&self) -> ApiResult<Dek> {
        unlock(
            &self.store,
            &self.password,
            &format!("The given password for '{}' is incorrect", self.location),
        )
    }
}

/// What a copy of an encrypted medium takes over with the content, which is encrypted: the properties of its base.
pub(crate) struct Carried {
    key_store: String,
    key_id: String,
}

impl Carried {
    /// What a copy of the medium in `format`, with a size that grows or not, has to take over; `None` if it is not encrypted.
    pub(crate) fn of(
        media: &MediaPool,
        id: Uuid,
        format: vd::Format,
        grows: bool,
    ) -> ApiResult<Option<Self>> {
        let Some((key_store, key_id)) = settings(media, id) else { return Ok(None) };
        let medium = media.medium(id)?;
        if medium.format != format.name() || !grows {
            let text = format!(
                "The medium '{}' is encrypted, so that only copies of its own format whose size grows can be made (--format {} --variant \
                 Standard): decrypt it first for another (encryptmedium --oldpassword)",
                medium.location.display(),
                medium.format
            );
            return Err(error(ResultCode::NotSupported, text));
        }
        Ok(Some(Self { key_store, key_id }))
    }

    pub(crate) fn put(&self, medium: &mut Medium) {
        medium.properties.insert(KEY_STORE.to_owned(), self.key_store.clone());
        medium.properties.insert(KEY_ID.to_owned(), self.key_id.clone());
    }
}

/// Refuses what needs the content of an encrypted medium.
pub(crate) fn refuse(media: &MediaPool, id: Uuid, what: &str) -> ApiResult<()> {
    if settings(media, id).is_none() {
        return Ok(());
    }
    let location = media.medium(id)?.location.display().to_string();
    Err(error(
        ResultCode::NotSupported,
        format!(
            "The encrypted medium '{location}' cannot be {what}: decrypt it first (encryptmedium --oldpassword)"
        ),
    ))
}

/// Whether a medium can be worked on: a switch of its chain that could not be completed leaves files of two kinds.
pub(crate) fn check(media: &MediaPool, id: Uuid) -> ApiResult<()> {
    match base(media, id) {
        Some(base) if base.properties.contains_key(NOTE) => Err(error(
            ResultCode::InvalidObjectState,
            format!(
                "The encryption of the medium '{}' was changed, and its new files are not in their places: see to it that \
                 its folder can be written to, and start VBoxSVC again",
                base.location.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// Where the new files of a medium are made.
fn folder(medium: &Medium) -> PathBuf {
    let mut name = medium.location.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.recrypt", medium.id.simple()));
    medium.location.with_file_name(name)
}

/// The medium with all that depend on it.
fn tree(media: &MediaPool, id: Uuid) -> Vec<Uuid> {
    let mut all = vec![id];
    let mut at = 0;
    while let Some(id) = all.get(at) {
        all.extend(media.children(*id).into_iter().filter(|child| !all.contains(child)).collect::<Vec<_>>());
        at += 1;
    }
    all
}

/// Completes what notes tell of.
pub(crate) fn finish_switches(media: &mut MediaPool) {
    let noted: Vec<Uuid> =
        media.ids().filter(|id| media.find(*id).is_some_and(|m| m.properties.contains_key(NOTE))).collect();
    for id in noted {
        let folders: Vec<PathBuf> =
            tree(media, id).into_iter().filter_map(|id| media.find(id).map(folder)).collect();
        let begun = folders.iter().any(|folder| Recrypted::is_there(folder));
        let done = folders.iter().filter(|_| begun).try_for_each(|f| Recrypted::finish(f).map(drop));
        let Ok(base) = media.medium_mut(id) else { continue };
        let location = base.location.display().to_string();
        match done {
            Ok(()) => {
                tracing::warn!(location, begun, "an encryption that was interrupted is settled");
                settle(base, begun);
            }
            Err(error) => tracing::error!(location, %error, "an interrupted encryption cannot be completed"),
        }
    }
}

/// Takes the note off; what it says holds if the switch was made.
fn settle(base: &mut Medium, made: bool) {
    base.properties.remove(NOTE);
    let new = [(KEY_STORE, NEW_KEY_STORE), (KEY_ID, NEW_KEY_ID)];
    for (name, noted) in new {
        let value = base.properties.remove(noted);
        if made {
            base.properties.remove(name);
            if let Some(value) = value {
                base.properties.insert(name.to_owned(), value);
            }
        }
    }
}

/// What a client asks for. Empty texts are not given.
struct Wanted {
    current: String,
    cipher: String,
    new: String,
    new_id: String,
}

impl Wanted {
    /// The old key and the new one with its store, by VirtualBox's rules. Takes a second or so.
    fn keys(&self, store: Option<&str>) -> ApiResult<(Option<Dek>, Option<(Dek, String)>)> {
        let old = match (self.current.as_str(), store) {
            ("", None) => None,
            ("", Some(_)) => {
                return Err(error(
                    ResultCode::PasswordIncorrect,
                    "The password given for the encrypted image is incorrect",
                ));
            }
            (_, None) => {
                return Err(error(
                    ResultCode::InvalidObjectState,
                    "The image is not configured for encryption",
                ));
            }
            (current, Some(store)) => {
                Some(unlock(store, current, "The password to decrypt the image is incorrect")?)
            }
        };
        if self.cipher.is_empty() {
            if !self.new.is_empty() || !self.new_id.is_empty() {
                let text =
                    "The password and password identifier must be empty if the output should be unencrypted";
                return Err(error(ResultCode::InvalidObjectState, text));
            }
            return Ok((old, None));
        }
        let password = match (self.new.as_str(), self.new_id.as_str()) {
            ("", "") if old.is_some() => &self.current,
            ("", _) => {
                let text = "A password must be given for the image encryption";
                return Err(error(ResultCode::ObjectNotFound, text));
            }
            (_, "") => {
                let text = "A valid identifier for the password must be given";
                return Err(error(ResultCode::InvalidObjectState, text));
            }
            (new, _) => new,
        };
        let algorithm = Algorithm::from_name(&self.cipher).ok_or_else(|| {
            let (a, b) = (Algorithm::AesXts128.name(), Algorithm::AesXts256.name());
            error(
                ResultCode::NotSupported,
                format!("The cipher '{}' is not known: {a} and {b} are", self.cipher),
            )
        })?;
        let no_random = |e: &dyn std::fmt::Display| {
            error(ResultCode::IprtError, format!("Could not make a key for the image ({e})"))
        };
        let dek = Dek::random(algorithm).map_err(|e| no_random(&e))?;
        let store = KeyStore::create(&dek, password).map_err(|e| no_random(&e))?.encode();
        Ok((old, Some((dek, store))))
    }
}

fn change(c: &Context, wanted: Wanted) -> ApiResult<ObjRef<IProgress>> {
    let id = own(c)?;
    let state = c.svc.state.lock();
    let media = &state.media;
    let medium = media.medium(id)?;
    let location = medium.location.display().to_string();
    if medium.kind != DriveType::HardDisk {
        let text = format!("Cannot encrypt DVD or Floppy medium '{location}'");
        return Err(error(ResultCode::InvalidObjectState, text));
    }
    let chain = media.chain(id)?;
    let mut work = Vec::new();
    for (number, file) in chain.iter().zip(media.images(id)?) {
        let medium = media.medium(*number)?;
        let cannot = |why: String| {
            let text = format!("Cannot encrypt medium '{}' because it {why}", medium.location.display());
            Err(error(ResultCode::InvalidObjectState, text))
        };
        match (users_of(&state, *number).len(), media.children(*number).len()) {
            (users @ 2.., _) => return cannot(format!("is attached to {users} virtual machines")),
            (_, children @ 1..) if *number == id => return cannot(format!("has {children} children")),
            (_, children @ 2..) => return cannot(format!("has {children} children")),
            _ => work.push((file, folder(medium))),
        }
    }
    let base_id = chain.first().copied().unwrap_or(id);
    let store = media.medium(base_id)?.properties.get(KEY_STORE).cloned();
    let action =
        if wanted.cipher.is_empty() && !wanted.current.is_empty() { "Decrypting" } else { "Encrypting" };
    let tasks: Vec<_> = chain.iter().map(|id| (*id, Task::Write)).collect();
    let folders: Vec<PathBuf> = work.iter().map(|(_, folder)| folder.clone()).collect();
    let new_id = wanted.new_id.clone();
    let make = move |progress: &Progress| -> ApiResult<(Vec<Recrypted>, Option<String>)> {
        let (old, new) = wanted.keys(store.as_deref())?;
        let mut made: Vec<Recrypted> = Vec::new();
        let count = work.len() as u64;
        for (number, (vd::Source { path, format, .. }, folder)) in work.into_iter().enumerate() {
            let mut tell = |done: u64, of: u64| {
                let whole =
                    (u128::from(number as u64) * 100 + u128::from(done) * 100 / u128::from(of.max(1))) as u64;
                progress.set((whole / count.max(1)) as u32, "");
                !progress.canceled()
            };
            let new = new.as_ref().map(|(dek, _)| dek);
            match Recrypted::make(&path, format, &folder, old.as_ref(), new, &mut tell) {
                Ok(one) => made.push(one),
                Err(e) => {
                    made.into_iter().for_each(Recrypted::discard);
                    let what = format!("Could not prepare disk images for encryption: '{}'", path.display());
                    return Err(failed(&what, e));
                }
            }
        }
        Ok((made, new.map(|(_, store)| store)))
    };
    let end = move |svc: &Svc,
                    state: &mut crate::svc::State,
                    (made, store): (Vec<Recrypted>, Option<String>)| {
        let base = state.media.medium_mut(base_id)?;
        if base.registries.is_empty() {
            // The key must outlive the service.
            base.registries.push(Uuid::nil());
        }
        let owners = base.registries.clone();
        base.properties.insert(NOTE.to_owned(), "yes".to_owned());
        if let Some(store) = store {
            base.properties.insert(NEW_KEY_STORE.to_owned(), store);
            let old_id = base.properties.get(KEY_ID).cloned().unwrap_or_default();
            let id = if new_id.is_empty() { old_id } else { new_id };
            base.properties.insert(NEW_KEY_ID.to_owned(), id);
        }
        if let Err(error) = save_registries(svc, state, &owners) {
            // Whether the note got into the file or not: without folders nothing comes of it.
            made.into_iter().for_each(Recrypted::discard);
            settle(state.media.medium_mut(base_id)?, false);
            return Err(error);
        }
        for one in made {
            one.install().map_err(|e| failed("Could not put the new disk images into their places", e))?;
        }
        settle(state.media.medium_mut(base_id)?, true);
        save_registries(svc, state, &owners)?;
        folders.iter().for_each(|folder| Recrypted::forget(folder));
        for id in chain {
            state.media.medium_mut(id)?.refresh();
        }
        Ok(())
    };
    run(c, state, format!("{action} medium '{location}'"), true, tasks, make, end, |_| {})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Phase;

    fn pool(file: &std::path::Path) -> (MediaPool, Uuid) {
        let options = vd::CreateOptions {
            format: vd::Format::Vdi,
            variant: vd::Variant::Dynamic,
            size: vbox_types::ByteSize(4 << 20),
            uuid: None,
            comment: String::new(),
        };
        vd::create(file, &options).unwrap();
        let (mut pool, id) = (MediaPool::default(), Uuid::from_u128(9));
        let mut medium = Medium::new(id, DriveType::HardDisk, file.to_owned(), "VDI");
        medium.phase = Phase::There;
        medium.properties.insert(NOTE.to_owned(), "yes".to_owned());
        medium.properties.insert(NEW_KEY_STORE.to_owned(), "new".to_owned());
        medium.properties.insert(NEW_KEY_ID.to_owned(), "id".to_owned());
        pool.insert(medium);
        (pool, id)
    }

    /// Every moment at which the service can be killed, after the note was written.
    #[test]
    fn a_switch_is_completed_or_forgotten_by_what_lies_beside_the_file() {
        let dir = std::env::temp_dir().join(format!("boxwood-switch-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("d.vdi");
        let (mut media, id) = pool(&file);
        let folder = folder(media.find(id).unwrap());
        let properties = |media: &MediaPool| media.find(id).unwrap().properties.clone();
        // Discarded: the old key is the right one.
        finish_switches(&mut media);
        assert!(properties(&media).is_empty() && settings(&media, id).is_none());
        std::fs::remove_file(&file).unwrap();
        for renamed in [false, true] {
            let (mut media, id) = pool(&file);
            let dek = Dek::random(Algorithm::AesXts128).unwrap();
            let new = Recrypted::make(&file, vd::Format::Vdi, &folder, None, Some(&dek), &mut |_, _| true);
            if renamed {
                new.unwrap().install().unwrap();
            }
            assert!(check(&media, id).is_err());
            finish_switches(&mut media);
            assert_eq!(settings(&media, id), Some(("new".to_owned(), "id".to_owned())));
            assert!(check(&media, id).is_ok() && !folder.exists());
            std::fs::remove_file(&file).unwrap();
            Recrypted::forget(&folder);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
