//! Manifests: a line `SHA256 (name) = digest` for each file of a package.

use sha1::Digest as _;

use crate::error::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha512];

    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A digest on the way.
pub enum Digest {
    Sha1(Box<sha1::Sha1>),
    Sha256(Box<sha2::Sha256>),
    Sha512(Box<sha2::Sha512>),
}

impl Digest {
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha1 => Self::Sha1(Box::default()),
            Algorithm::Sha256 => Self::Sha256(Box::default()),
            Algorithm::Sha512 => Self::Sha512(Box::default()),
        }
    }

    pub fn update(&mut self, data: &[u8]) {
        match self {
            Self::Sha1(d) => d.update(data),
            Self::Sha256(d) => d.update(data),
            Self::Sha512(d) => d.update(data),
        }
    }

    /// In lower-case hexadecimal.
    pub fn finish(self) -> String {
        fn hex(bytes: &[u8]) -> String {
            use std::fmt::Write as _;
            bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            })
        }
        match self {
            Self::Sha1(d) => hex(&d.finalize()),
            Self::Sha256(d) => hex(&d.finalize()),
            Self::Sha512(d) => hex(&d.finalize()),
        }
    }
}

/// The digests of a package's files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<(String, Algorithm, String)>,
}

impl Manifest {
    /// Reads a manifest; `name` is for errors.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Error> {
        let error = |line: usize, text| Error::Manifest { name: name.to_owned(), line, text };
        let text = std::str::from_utf8(bytes).map_err(|_| error(1, "not UTF-8"))?;
        let mut manifest = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let number = number + 1;
            let (word, rest) =
                line.split_once('(').ok_or_else(|| error(number, "no file name in parentheses"))?;
            let algorithm = Algorithm::ALL
                .into_iter()
                .find(|a| a.name().eq_ignore_ascii_case(word.trim()))
                .ok_or_else(|| error(number, "an unknown kind of digest"))?;
            // A name may hold parentheses itself.
            let (file, value) =
                rest.rsplit_once(')').ok_or_else(|| error(number, "no closing parenthesis"))?;
            let value =
                value.trim_start().strip_prefix('=').ok_or_else(|| error(number, "no equals sign"))?;
            let value = value.trim().to_ascii_lowercase();
            if value.len() != algorithm.hex_len() || !value.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error(number, "the digest has not the form of its kind"));
            }
            if manifest.entries.iter().any(|(f, a, _)| f == file && *a == algorithm) {
                return Err(error(number, "the file has two digests of a kind"));
            }
            manifest.entries.push((file.to_owned(), algorithm, value));
        }
        Ok(manifest)
    }

    pub fn add(&mut self, file: &str, algorithm: Algorithm, value: String) {
        self.entries.push((file.to_owned(), algorithm, value));
    }

    /// The digests to compute for a file; an error if the manifest does not have it.
    pub fn digests(&self, file: &str) -> Result<Vec<Digest>, Error> {
        let all: Vec<Digest> =
            self.entries.iter().filter(|(f, ..)| f == file).map(|(_, a, _)| Digest::new(*a)).collect();
        if all.is_empty() {
            return Err(Error::Digest(format!("Entry '{file}' was not found in the 1st manifest")));
        }
        Ok(all)
    }

    /// Compares what [`Self::digests`] came to with the manifest.
    pub fn check(&self, file: &str, computed: Vec<Digest>) -> Result<(), Error> {
        let wanted = self.entries.iter().filter(|(f, ..)| f == file);
        for ((_, algorithm, wanted), computed) in wanted.zip(computed) {
            let found = computed.finish();
            if *wanted != found {
                return Err(Error::Digest(format!(
                    "Attribute '{}' on '{file}' does not match ('{wanted}' vs. '{found}')",
                    algorithm.name()
                )));
            }
        }
        Ok(())
    }

    /// The text, as VirtualBox writes it.
    pub fn to_text(&self) -> String {
        self.entries.iter().map(|(file, a, value)| format!("{} ({file}) = {value}\n", a.name())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_SHA1: &str = "da39a3ee5e6b4b0d3255bfef95601890afd80709";

    #[test]
    fn both_spellings_are_read_and_one_is_written() {
        let text =
            format!("SHA1(a.ovf)= {EMPTY_SHA1}\r\nsha1 (b (1).vmdk) = {}\n", EMPTY_SHA1.to_uppercase());
        let manifest = Manifest::parse("x.mf", text.as_bytes()).unwrap();
        let again = manifest.to_text();
        assert_eq!(again, format!("SHA1 (a.ovf) = {EMPTY_SHA1}\nSHA1 (b (1).vmdk) = {EMPTY_SHA1}\n"));
        assert_eq!(Manifest::parse("x.mf", again.as_bytes()).unwrap(), manifest);
    }

    #[test]
    fn a_file_that_differs_or_is_not_listed_is_refused() {
        let manifest = Manifest::parse("x.mf", format!("SHA1(a)= {EMPTY_SHA1}").as_bytes()).unwrap();
        let mut digests = manifest.digests("a").unwrap();
        manifest.check("a", std::mem::take(&mut digests)).unwrap();
        let mut digests = manifest.digests("a").unwrap();
        digests[0].update(b"x");
        assert!(matches!(manifest.check("a", digests), Err(Error::Digest(_))));
        assert!(matches!(manifest.digests("b"), Err(Error::Digest(_))));
    }

    #[test]
    fn damaged_lines_are_refused_by_number() {
        for text in ["SHA1 a = 00", "MD5 (a) = 00", "SHA1 (a) = 00", "SHA1 (a) 00", "\n\nSHA1 (a = 00"] {
            assert!(
                matches!(Manifest::parse("x.mf", text.as_bytes()), Err(Error::Manifest { .. })),
                "{text}"
            );
        }
    }
}
