//! Sizes as people write them: one spelling for the options of `pando` and the configurations of
//! the daemons.

use bytesize::ByteSize;

/// What a size looks like, for messages.
pub const SIZE_FORM: &str = "a number of bytes, or a number with K, M, G or T (powers of 1024, also \
                             KiB, MiB, GiB, TiB) or KB, MB, GB or TB (powers of 1000)";

/// Reads a size: `4096`, `10G` and `10GiB` are the same power of 1024 that truncate, lvcreate, zfs
/// and qemu-img take them for; `10GB` is a power of 1000, as for truncate. Case does not matter.
///
/// # Errors
/// A message that quotes `text` and contains [`SIZE_FORM`].
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim_start();
    // `bytesize` reads a letter alone as a power of 1000.
    let letter = unit.len() == 1 && !unit.eq_ignore_ascii_case("b");
    let spelled = if letter { format!("{text}iB") } else { text.to_owned() };
    match spelled.parse::<ByteSize>() {
        // It saturates.
        Ok(ByteSize(u64::MAX)) => Err(format!("{text:?} is more than 2^64 bytes")),
        Ok(size) => Ok(size.as_u64()),
        Err(_) => Err(format!("{text:?} is not a size; write {SIZE_FORM}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("4k", 4 << 10),
            ("4K", 4 << 10),
            ("10M", 10 << 20),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("10Gi", 10 << 30),
            ("10GiB", 10 << 30),
            ("10 GiB", 10 << 30),
            (" 10G ", 10 << 30),
            ("1.5T", 3 << 39),
            ("1.5TiB", 3 << 39),
            ("10KB", 10_000),
            ("10GB", 10_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_texts_are_quoted_with_the_form() {
        for text in ["", "lots", "-1", "G", "1.2.3G", "10X", "10GG", "0x10", "10 20", "10\u{e9}"] {
            let message = parse_size(text).unwrap_err();
            assert!(message.starts_with(&format!("{text:?} is not a size")), "{message}");
            assert!(message.contains("powers of 1024"), "{message}");
        }
        assert!(parse_size("17000000T").unwrap_err().contains("more than 2^64 bytes"));
        assert!(parse_size("99999999999999999999").is_err());
    }
}
