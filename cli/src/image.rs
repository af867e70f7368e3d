//! Files that are not what a disk holds but contain it: images of virtual machines and compressed
//! streams, recognised by their first bytes.

use std::path::Path;

use crate::error::Error;

/// Bytes at the start that are looked at.
pub(crate) const HEAD_BYTES: usize = 512;
/// Bytes at the end that are looked at.
pub(crate) const TAIL_BYTES: usize = 512;

/// A format that contains a disk.
pub(crate) struct Format {
    offset: usize,
    magic: &'static [u8],
    name: &'static str,
    opener: Opener,
}

/// Which program extracts the content of the disk.
enum Opener {
    /// `qemu-img convert`, with options if it does not recognise the format by itself.
    Image(&'static str),
    /// A program that decompresses a file, or its standard input, with `-dc`.
    Stream(&'static str),
}

const fn image(offset: usize, magic: &'static [u8], name: &'static str) -> Format {
    Format { offset, magic, name, opener: Opener::Image("") }
}

const fn stream(magic: &'static [u8], name: &'static str, program: &'static str) -> Format {
    Format { offset: 0, magic, name, opener: Opener::Stream(program) }
}

const FORMATS: [Format; 13] = [
    image(0, b"QFI\xFB", "a qcow2 image"),
    image(0, b"QED\0", "a QED image"),
    image(0, b"KDMV", "a VMDK image"),
    image(0, b"COWD", "a VMDK image"),
    image(0, b"# Disk DescriptorFile", "the descriptor of a VMDK image"),
    image(0, b"vhdxfile", "a VHDX image"),
    image(0, b"conectix", "a VHD image"),
    image(64, &[0x7F, 0x10, 0xDA, 0xBE], "a VDI image"),
    stream(&[0x1F, 0x8B, 8], "a gzip stream", "gzip"),
    stream(&[0x28, 0xB5, 0x2F, 0xFD], "a zstd stream", "zstd"),
    stream(&[0xFD, b'7', b'z', b'X', b'Z', 0], "an xz stream", "xz"),
    stream(&[0x04, 0x22, 0x4D, 0x18], "an lz4 stream", "lz4"),
    // Behind the size of its blocks, a digit.
    Format {
        offset: 4,
        magic: &[0x31, 0x41, 0x59, 0x26, 0x53, 0x59],
        name: "a bzip2 stream",
        opener: Opener::Stream("bzip2"),
    },
];

/// A VHD of fixed size is the content of a disk and a footer behind it.
const FIXED_VHD: Format =
    Format { offset: 0, magic: b"conectix", name: "a VHD image", opener: Opener::Image("-f vpc ") };

impl Format {
    /// The format of a file that begins with `head`.
    pub(crate) fn of_head(head: &[u8]) -> Option<&'static Self> {
        FORMATS.iter().find(|format| format.is_in(head))
    }

    /// The format of a file that ends with `tail`, [`TAIL_BYTES`] long.
    pub(crate) fn of_tail(tail: &[u8]) -> Option<&'static Self> {
        Some(&FIXED_VHD).filter(|format| tail.len() == TAIL_BYTES && format.is_in(tail))
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        bytes.get(self.offset..).is_some_and(|rest| rest.starts_with(self.magic))
    }

    /// Why `path` is not imported as it is into `volume`, with the commands that import the content.
    /// `None` is standard input.
    pub(crate) fn refusal(&self, path: Option<&Path>, volume: &str) -> Error {
        let shown = path.map_or_else(|| "standard input".into(), |path| path.display().to_string());
        let file = path.map_or_else(|| "FILE".to_owned(), quoted);
        let advice = match (&self.opener, path) {
            (Opener::Image(options), _) => {
                let raw = path.map_or_else(
                    || "FILE.raw".to_owned(),
                    |path| quoted(format!("{}.raw", path.display()).as_ref()),
                );
                format!(
                    "`qemu-img convert {options}-O raw {file} {raw} && \
                     pando volume import {volume} {raw}`"
                )
            }
            (Opener::Stream(program), Some(_)) => {
                format!("`{program} -dc {file} | pando volume import {volume} -`")
            }
            (Opener::Stream(program), None) => {
                format!("`... | {program} -dc | pando volume import {volume} -`")
            }
        };
        Error::new(format!("{shown} is {}, not the content of a disk", self.name))
            .hint(format!("{advice}; --raw imports the bytes as they are"))
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%".contains(c);
    match text.chars().all(plain) && !text.starts_with('-') {
        true => text,
        false if text.starts_with('-') => format!("'./{}'", text.replace('\'', r"'\''")),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_recognised() {
        let name = |head: &[u8]| Format::of_head(head).map(|format| format.name);
        assert_eq!(name(b"QFI\xFB\0\0\0\x03"), Some("a qcow2 image"));
        assert_eq!(name(b"BZh91AY&SY"), Some("a bzip2 stream"));
        let mut vdi = vec![b'<'; 64];
        vdi.extend([0x7F, 0x10, 0xDA, 0xBE]);
        assert_eq!(name(&vdi), Some("a VDI image"));
        for short in [&b""[..], b"Q", b"QFI", &[0x1F, 0x8B], &[0; 512]] {
            assert_eq!(name(short), None, "{short:?}");
        }
        let mut footer = b"conectix".to_vec();
        assert!(Format::of_tail(&footer).is_none(), "a footer has 512 bytes");
        footer.resize(TAIL_BYTES, 0);
        assert_eq!(Format::of_tail(&footer).map(|format| format.name), Some("a VHD image"));
        assert!(Format::of_tail(&[0; TAIL_BYTES]).is_none());
    }

    #[test]
    fn commands_can_be_pasted() {
        let format = Format::of_head(b"QFI\xFB").unwrap();
        let text = format.refusal(Some(Path::new("my disk.qcow2")), "db").to_string();
        let command = "`qemu-img convert -O raw 'my disk.qcow2' 'my disk.qcow2.raw' && \
                       pando volume import db 'my disk.qcow2.raw'`";
        assert!(text.contains(command), "{text}");
        assert_eq!(quoted(Path::new("-x")), "'./-x'");
        assert_eq!(quoted(Path::new("it's")), r"'it'\''s'");
    }
}
