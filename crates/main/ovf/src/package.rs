//! Packages as files: a descriptor with files beside it, or a tar archive of them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::envelope::{Envelope, FileRef};
use crate::error::Error;
use crate::manifest::{Algorithm, Digest, Manifest};

/// Largest descriptor that is read, in bytes.
const MAX_DESCRIPTOR: u64 = 16 << 20;
/// Largest manifest.
const MAX_MANIFEST: u64 = 4 << 20;
/// Most members of an archive.
const MAX_MEMBERS: usize = 65536;

/// `href` as the name of a member: a plain relative path, or an error.
pub fn member_name(href: &str) -> Result<&str, Error> {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
    // Back slashes are separators on other hosts, colons introduce schemes and drives.
    let safe =
        !href.is_empty() && !href.contains(['\\', ':', '\0']) && Path::new(href).components().all(plain);
    if safe { Ok(href) } else { Err(Error::Climbs(href.to_owned())) }
}

enum Members {
    /// Beside the descriptor, in this folder.
    Folder(PathBuf),
    /// Where each member's bytes lie in the archive.
    Archive(HashMap<String, (u64, u64)>),
}

/// A package that has been opened: its descriptor is read and, if there is a manifest, checked.
pub struct Package {
    path: PathBuf,
    members: Members,
    manifest: Option<Manifest>,
    pub envelope: Envelope,
}

fn read_all(name: &str, file: impl Read, size: u64, limit: u64) -> Result<Vec<u8>, Error> {
    if size > limit {
        return Err(Error::TooLarge { name: name.to_owned(), size, limit });
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(|e| Error::host("read", Path::new(name), e))?;
    Ok(bytes)
}

fn open(path: &Path) -> Result<(File, u64), Error> {
    let file = File::open(path).map_err(|e| Error::host("open", path, e))?;
    let meta = file.metadata().map_err(|e| Error::host("open", path, e))?;
    if !meta.is_file() {
        let not_a_file = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::host("open", path, not_a_file));
    }
    Ok((file, meta.len()))
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Package {
    /// Opens an `.ovf` or `.ova` file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        match extension.as_deref() {
            Some("ovf") => Self::open_folder(path),
            Some("ova") => Self::open_archive(path),
            _ => Err(Error::Extension),
        }
    }

    fn open_folder(path: &Path) -> Result<Self, Error> {
        let name = file_name(path);
        let (file, size) = open(path)?;
        let descriptor = read_all(&name, file, size, MAX_DESCRIPTOR)?;
        let manifest_path = path.with_extension("mf");
        let manifest = match open(&manifest_path) {
            Ok((file, size)) => {
                let mf_name = file_name(&manifest_path);
                Some(Manifest::parse(&mf_name, &read_all(&mf_name, file, size, MAX_MANIFEST)?)?)
            }
            Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Self::checked(path, Members::Folder(folder), manifest, &name, &descriptor)
    }

    fn open_archive(path: &Path) -> Result<Self, Error> {
        let (file, length) = open(path)?;
        let fail = |e| Error::host("read the archive", path, e);
        let mut archive = tar::Archive::new(&file);
        let mut members = HashMap::new();
        let mut descriptor: Option<(String, Vec<u8>)> = None;
        let mut manifest = None;
        for entry in archive.entries_with_seek().map_err(fail)? {
            let mut entry = entry.map_err(fail)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous => {}
                tar::EntryType::Directory => continue,
                // Links and devices have no place in a package, and lead out of it.
                _ => return Err(Error::Climbs(name)),
            }
            let name = member_name(&name)?.to_owned();
            let (start, size) = (entry.raw_file_position(), entry.size());
            if start.checked_add(size).is_none_or(|end| end > length) {
                return Err(fail(io::ErrorKind::UnexpectedEof.into()));
            }
            if members.len() >= MAX_MEMBERS {
                return Err(Error::content(format!("the archive has more than {MAX_MEMBERS} members")));
            }
            let suffix = name.rsplit_once('.').map_or(String::new(), |(_, s)| s.to_ascii_lowercase());
            // The first of each counts.
            if suffix == "ovf" && descriptor.is_none() {
                let bytes = read_all(&name, &mut entry, size, MAX_DESCRIPTOR)?;
                descriptor = Some((name.clone(), bytes));
            } else if suffix == "mf" && manifest.is_none() {
                manifest = Some(Manifest::parse(&name, &read_all(&name, &mut entry, size, MAX_MANIFEST)?)?);
            }
            if members.insert(name.clone(), (start, size)).is_some() {
                return Err(Error::content(format!("the archive has two members called \"{name}\"")));
            }
        }
        let Some((name, bytes)) = descriptor else {
            return Err(Error::NoDescriptor { path: path.to_owned() });
        };
        Self::checked(path, Members::Archive(members), manifest, &name, &bytes)
    }

    fn checked(
        path: &Path,
        members: Members,
        manifest: Option<Manifest>,
        name: &str,
        descriptor: &[u8],
    ) -> Result<Self, Error> {
        if let Some(manifest) = &manifest
            // VirtualBox lets a manifest leave out the descriptor.
            && let Ok(mut digests) = manifest.digests(name)
        {
            digests.iter_mut().for_each(|d| d.update(descriptor));
            manifest.check(name, digests)?;
        }
        let end = if descriptor.first() == Some(&b'<') {
            // Some products fill the last block with zeros.
            descriptor.iter().position(|b| *b == 0).unwrap_or(descriptor.len())
        } else {
            descriptor.len()
        };
        let envelope = Envelope::parse(name, &descriptor[..end])?;
        for file in &envelope.files {
            if !file.href.is_empty() {
                member_name(&file.href)?;
            }
        }
        Ok(Self { path: path.to_owned(), members, manifest, envelope })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there are digests to check files against.
    pub fn has_manifest(&self) -> bool {
        self.manifest.is_some()
    }

    fn member(&self, name: &str) -> Result<(File, u64), Error> {
        let name = member_name(name)?;
        match &self.members {
            Members::Folder(folder) => {
                let path = folder.join(name);
                match open(&path) {
                    Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        Err(Error::Missing(name.to_owned()))
                    }
                    other => other,
                }
            }
            Members::Archive(members) => {
                let (start, size) = members.get(name).ok_or_else(|| Error::Missing(name.to_owned()))?;
                let (mut file, _) = open(&self.path)?;
                file.seek(SeekFrom::Start(*start)).map_err(|e| Error::host("read", &self.path, e))?;
                Ok((file, *size))
            }
        }
    }

    /// Whether the file is there, and its size in the package.
    pub fn size_of(&self, file: &FileRef) -> Result<u64, Error> {
        self.member(&file.href).map(|(_, size)| size)
    }

    /// The file on its own, if it needs no unpacking: its path. It is checked against the manifest all the same.
    pub fn plain_file(&self, file: &FileRef) -> Result<Option<PathBuf>, Error> {
        match &self.members {
            Members::Folder(folder) if !file.gzip => Ok(Some(folder.join(member_name(&file.href)?))),
            _ => Ok(None),
        }
    }

    /// Copies the file's content to `out`, unpacked, and checks it against the manifest. `progress` is told the bytes read
    /// so far and those there are; it returns whether to go on.
    pub fn copy(
        &self,
        file: &FileRef,
        out: &mut dyn Write,
        limit: u64,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), Error> {
        let (source, size) = self.member(&file.href)?;
        let digests = match &self.manifest {
            Some(manifest) => manifest.digests(&file.href)?,
            None => Vec::new(),
        };
        let name = Path::new(&file.href);
        let mut source = Hashed { inner: source.take(size), digests, done: 0 };
        let mut buffer = vec![0; 1 << 20];
        let mut written = 0u64;
        let mut pump = |from: &mut dyn Read, done: &mut dyn FnMut() -> u64| -> Result<bool, Error> {
            let count = from.read(&mut buffer).map_err(|e| Error::host("read", name, e))?;
            written += count as u64;
            if written > limit {
                return Err(Error::TooLarge { name: file.href.clone(), size: written, limit });
            }
            out.write_all(&buffer[..count]).map_err(|e| Error::host("copy", name, e))?;
            if !progress(done(), size) {
                return Err(Error::host("copy", name, io::ErrorKind::Interrupted.into()));
            }
            Ok(count > 0)
        };
        if file.gzip {
            let mut unpacked = MultiGzDecoder::new(&mut source);
            while pump(&mut unpacked, &mut || 0)? {}
            // What follows the compressed data is part of the file that the manifest means.
            io::copy(&mut source, &mut io::sink()).map_err(|e| Error::host("read", name, e))?;
        } else {
            let mut done = 0;
            loop {
                let before = done;
                let more = pump(&mut source, &mut || before)?;
                done = source.done;
                if !more {
                    break;
                }
            }
        }
        if source.done != size {
            return Err(Error::host("read", name, io::ErrorKind::UnexpectedEof.into()));
        }
        match &self.manifest {
            Some(manifest) => manifest.check(&file.href, source.digests),
            None => Ok(()),
        }
    }
}

/// A reader that computes digests on the way.
struct Hashed<R> {
    inner: R,
    digests: Vec<Digest>,
    done: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.digests.iter_mut().for_each(|d| d.update(&buffer[..count]));
        self.done += count as u64;
        Ok(count)
    }
}

/// Writes a package: the descriptor first, the manifest last. What is there under the names is an error.
pub struct Archive {
    path: PathBuf,
    /// None for a descriptor with its files beside it.
    tar: Option<tar::Builder<File>>,
    manifest: Option<(Algorithm, Manifest)>,
    written: Vec<PathBuf>,
}

impl Archive {
    /// `manifest`: the kind of digest, if there shall be a manifest.
    pub fn create(path: &Path, manifest: Option<Algorithm>) -> Result<Self, Error> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let mut archive = Self {
            path: path.to_owned(),
            tar: None,
            manifest: manifest.map(|a| (a, Manifest::default())),
            written: Vec::new(),
        };
        match extension.as_deref() {
            Some("ovf") => {}
            Some("ova") => archive.tar = Some(tar::Builder::new(archive.create_file(path)?)),
            _ => return Err(Error::Extension),
        }
        Ok(archive)
    }

    /// The name of the descriptor.
    pub fn descriptor_name(path: &Path) -> String {
        file_name(&path.with_extension("ovf"))
    }

    fn create_file(&mut self, path: &Path) -> Result<File, Error> {
        let file = File::options().write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::host("create", path, e))?;
        self.written.push(path.to_owned());
        Ok(file)
    }

    /// Adds a file with the content of `source`.
    pub fn add(
        &mut self,
        name: &str,
        source: impl Read,
        size: u64,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Error> {
        let name = member_name(name)?.to_owned();
        let digests = self.manifest.iter().map(|(a, _)| Digest::new(*a)).collect();
        let mut source = Watched { inner: Hashed { inner: source.take(size), digests, done: 0 }, progress };
        let path = self.path.with_file_name(&name);
        match &mut self.tar {
            Some(tar) => {
                let mut header = tar::Header::new_ustar();
                header.set_size(size);
                header.set_mode(0o640);
                header.set_mtime(
                    std::time::SystemTime::now()
                        .duration_since(std::time::UNIX_EPOCH)
                        .map_or(0, |d| d.as_secs()),
                );
                tar.append_data(&mut header, &name, &mut source)
                    .map_err(|e| Error::host("write", &self.path, e))?;
            }
            None => {
                let mut file = self.create_file(&path)?;
                io::copy(&mut source, &mut file).map_err(|e| Error::host("write", &path, e))?;
            }
        }
        let Hashed { digests, done, .. } = source.inner;
        if done != size {
            return Err(Error::host("write", &path, io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some((algorithm, manifest)) = &mut self.manifest
            && let Some(digest) = digests.into_iter().next()
        {
            manifest.add(&name, *algorithm, digest.finish());
        }
        Ok(())
    }

    /// Adds the finished file at `path`, which moves or goes.
    pub fn add_file(
        &mut self,
        name: &str,
        path: &Path,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Error> {
        let (file, size) = open(path)?;
        if self.tar.is_some() {
            self.add(name, file, size, progress)?;
            return std::fs::remove_file(path).map_err(|e| Error::host("delete", path, e));
        }
        let target = self.path.with_file_name(member_name(name)?);
        if let Some((algorithm, manifest)) = &mut self.manifest {
            let mut source = Watched {
                inner: Hashed { inner: file, digests: vec![Digest::new(*algorithm)], done: 0 },
                progress,
            };
            io::copy(&mut source, &mut io::sink()).map_err(|e| Error::host("read", path, e))?;
            if let Some(digest) = source.inner.digests.pop() {
                manifest.add(name, *algorithm, digest.finish());
            }
        }
        // Fails if something is there, which a renaming does not.
        std::fs::hard_link(path, &target).map_err(|e| Error::host("create", &target, e))?;
        self.written.push(target);
        std::fs::remove_file(path).map_err(|e| Error::host("delete", path, e))
    }

    /// Adds the manifest and makes all of it durable.
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some((_, manifest)) = self.manifest.take() {
            let name = file_name(&self.path.with_extension("mf"));
            let text = manifest.to_text();
            self.add(&name, text.as_bytes(), text.len() as u64, &mut |_| true)?;
        }
        if let Some(tar) = self.tar.take() {
            let fail = |e| Error::host("write", &self.path, e);
            tar.into_inner().map_err(fail)?.sync_all().map_err(fail)?;
        }
        self.written.clear();
        Ok(())
    }
}

impl Drop for Archive {
    /// A package that was not finished leaves nothing behind.
    fn drop(&mut self) {
        for path in &self.written {
            let _ = std::fs::remove_file(path);
        }
    }
}

struct Watched<'a, R> {
    inner: Hashed<R>,
    progress: &'a mut dyn FnMut(u64) -> bool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !(self.progress)(self.inner.done) {
            return Err(io::Error::other("canceled"));
        }
        self.inner.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVF: &str =
        r#"<Envelope xmlns:ovf="o"><References><File ovf:id="f" ovf:href="d.vmdk"/></References></Envelope>"#;

    fn pack(dir: &Path, name: &str, manifest: Option<Algorithm>) -> PathBuf {
        let path = dir.join(name);
        let mut archive = Archive::create(&path, manifest).unwrap();
        archive.add("p.ovf", OVF.as_bytes(), OVF.len() as u64, &mut |_| true).unwrap();
        archive.add("d.vmdk", &[7u8; 3000][..], 3000, &mut |_| true).unwrap();
        archive.finish().unwrap();
        path
    }

    fn temp(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ovf-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn content(package: &Package) -> Result<Vec<u8>, Error> {
        let file = package.envelope.files[0].clone();
        let mut out = Vec::new();
        package.copy(&file, &mut out, 1 << 20, &mut |_, _| true).map(|()| out)
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let dir = temp("both");
        for name in ["p.ovf", "p.ova"] {
            for manifest in [None, Some(Algorithm::Sha1), Some(Algorithm::Sha256)] {
                let path = pack(&dir, name, manifest);
                let package = Package::open(&path).unwrap();
                assert_eq!(content(&package).unwrap(), [7; 3000]);
                std::fs::remove_dir_all(&dir).unwrap();
                std::fs::create_dir_all(&dir).unwrap();
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let dir = temp("changed");
        let path = pack(&dir, "p.ova", Some(Algorithm::Sha256));
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.iter().rposition(|b| *b == 7).unwrap();
        bytes[at] = 8;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(content(&Package::open(&path).unwrap()), Err(Error::Digest(_))));
        // The descriptor's own bytes are checked when the package is opened.
        let at = bytes.windows(8).position(|w| w == b"Envelope").unwrap();
        bytes[at] = b'F';
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(Package::open(&path), Err(Error::Digest(_))));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        for href in ["../x", "/etc/passwd", "a/../../x", "file:///x", "c:\\x", "..\\x", "http://h/x"] {
            assert!(matches!(member_name(href), Err(Error::Climbs(_))), "{href}");
        }
        assert!(member_name("sub/disk.vmdk").is_ok());
        let dir = temp("climb");
        std::fs::write(dir.join("p.ovf"), OVF.replace("d.vmdk", "../../etc/passwd")).unwrap();
        assert!(matches!(Package::open(&dir.join("p.ovf")), Err(Error::Climbs(_))));
        let mut builder = tar::Builder::new(File::create(dir.join("p.ova")).unwrap());
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.as_mut_bytes()[..7].copy_from_slice(b"../evil");
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        builder.into_inner().unwrap();
        assert!(matches!(Package::open(&dir.join("p.ova")), Err(Error::Climbs(_))));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_package_cut_short_is_refused_and_one_not_finished_is_removed() {
        let dir = temp("cut");
        let path = pack(&dir, "p.ova", None);
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 100, 600, 1100, 2000] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let read = Package::open(&path).and_then(|p| content(&p));
            assert!(read.is_err(), "{len}");
        }
        std::fs::remove_file(&path).unwrap();
        let mut archive = Archive::create(&path, None).unwrap();
        archive.add("p.ovf", OVF.as_bytes(), OVF.len() as u64, &mut |_| true).unwrap();
        drop(archive);
        assert!(!path.exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
