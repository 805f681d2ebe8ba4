//! Finds firmware images on the host: SeaBIOS, its VGA BIOS, and boot ROMs, from the distribution's packages.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Directories that Debian's packages and other distributions use. `BOXWOOD_FIRMWARE_PATH` (colon-separated) comes first.
const SEARCH: &[&str] = &[
    "/usr/share/seabios",
    "/usr/share/qemu",
    "/usr/share/ipxe/qemu",
    "/usr/lib/ipxe/qemu",
    "/usr/share/qemu-firmware",
    "/usr/local/share/boxwood",
];

/// Larger files are not firmware.
const SIZE_LIMIT: u64 = 16 << 20;

/// Reads the image `file`; `package` is what the error recommends.
pub fn read(file: &str, package: &str) -> Result<Vec<u8>> {
    let own = std::env::var_os("BOXWOOD_FIRMWARE_PATH").unwrap_or_default();
    let places: Vec<PathBuf> = std::env::split_paths(&own)
        .filter(|p| !p.as_os_str().is_empty())
        .chain(SEARCH.iter().map(PathBuf::from))
        .collect();
    read_from(&places, file, package)
}

fn read_from(places: &[PathBuf], file: &str, package: &str) -> Result<Vec<u8>> {
    for place in places {
        let path = place.join(file);
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        if !meta.is_file() || meta.len() == 0 || meta.len() > SIZE_LIMIT {
            bail!("the firmware image \"{}\" has an impossible size of {} bytes", path.display(), meta.len());
        }
        return std::fs::read(&path).map_err(|error| {
            anyhow::anyhow!("cannot read the firmware image \"{}\": {error}", path.display())
        });
    }
    bail!(
        "the firmware image {file} was not found: install the package {package}, or name its directory in \
         BOXWOOD_FIRMWARE_PATH (searched: {})",
        places.iter().map(|p: &PathBuf| Path::display(p).to_string()).collect::<Vec<_>>().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_image_names_its_package() {
        let error = read_from(&[PathBuf::from("/nowhere")], "bios.bin", "seabios").unwrap_err().to_string();
        assert!(error.contains("bios.bin") && error.contains("package seabios"), "{error}");
    }
}
