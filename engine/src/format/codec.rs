//! The one user of `bincode`: records and the catalogue. Fixed-width little-endian integers
//! (`config::legacy`), so that the length of an encoding does not depend on the values in it, and
//! a limit on what a decoder may allocate.

use bincode::config::{self, Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CATALOGUE_BYTES_MAX, RECORD_BYTES_MAX};

type Bounded<const N: usize> = Configuration<LittleEndian, Fixint, Limit<N>>;
const RECORD: Bounded<RECORD_BYTES_MAX> = config::legacy().with_limit::<RECORD_BYTES_MAX>();
const CATALOGUE: Bounded<CATALOGUE_BYTES_MAX> =
    config::legacy().with_limit::<CATALOGUE_BYTES_MAX>();

/// Appends the encoding of a record's payload to `out`.
///
/// # Errors
/// `Invalid` when it is longer than [`RECORD_BYTES_MAX`].
pub fn encode_record<T: Encode>(value: &T, out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    bincode::encode_into_std_write(value, out, RECORD)
        .map_err(|e| Error::invalid(format!("record cannot be encoded: {e}")))?;
    if out.len() - start > RECORD_BYTES_MAX {
        return Err(Error::invalid("record is longer than its limit"));
    }
    Ok(())
}

/// Decodes a record's payload; all of `bytes` must be used.
///
/// # Errors
/// `Corrupt` on anything else than a whole value.
pub fn decode_record<T: Decode<()>>(bytes: &[u8]) -> Result<T> {
    whole(bincode::decode_from_slice(bytes, RECORD), bytes.len(), "journal record")
}

/// The encoding of the catalogue.
///
/// # Errors
/// `Limit` when it is longer than [`CATALOGUE_BYTES_MAX`].
pub fn encode_catalogue<T: Encode>(value: &T) -> Result<Vec<u8>> {
    let bytes = bincode::encode_to_vec(value, CATALOGUE)
        .map_err(|e| Error::invalid(format!("catalogue cannot be encoded: {e}")))?;
    if bytes.len() > CATALOGUE_BYTES_MAX {
        let what = format!("a catalogue of {} bytes is longer than its limit", bytes.len());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(bytes)
}

/// Decodes the catalogue; all of `bytes` must be used.
///
/// # Errors
/// `Corrupt` on anything else than a whole value.
pub fn decode_catalogue<T: Decode<()>>(bytes: &[u8]) -> Result<T> {
    whole(bincode::decode_from_slice(bytes, CATALOGUE), bytes.len(), "catalogue")
}

/// Where the numbers and strings of a value lie in its encoding, in their order: for tests that
/// change each of them. It is the encoder itself that tells, so that none is left out.
///
/// # Panics
/// Never: the writer takes everything.
#[cfg(any(test, feature = "testing"))]
#[must_use]
pub fn spans<T: Encode>(value: &T) -> Vec<std::ops::Range<usize>> {
    #[derive(Default)]
    struct Spans(Vec<std::ops::Range<usize>>);
    impl bincode::enc::write::Writer for Spans {
        fn write(&mut self, bytes: &[u8]) -> std::result::Result<(), bincode::error::EncodeError> {
            let start = self.0.last().map_or(0, |span| span.end);
            self.0.push(start..start + bytes.len());
            Ok(())
        }
    }
    let mut encoder = bincode::enc::EncoderImpl::new(Spans::default(), CATALOGUE);
    value.encode(&mut encoder).expect("a list takes everything");
    encoder.into_writer().0
}

fn whole<T>(
    decoded: std::result::Result<(T, usize), bincode::error::DecodeError>,
    len: usize,
    what: &str,
) -> Result<T> {
    match decoded {
        Ok((value, used)) if used == len => Ok(value),
        Ok((_, used)) => Err(Error::corrupt(format!("{what}: {} bytes too many", len - used))),
        Err(e) => Err(Error::corrupt(format!("{what} cannot be decoded: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_refused() {
        let fits = vec![0u8; RECORD_BYTES_MAX - 8];
        encode_record(&fits, &mut Vec::new()).unwrap();
        let error = encode_record(&vec![0u8; RECORD_BYTES_MAX - 7], &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("longer than its limit"), "{error}");
        let catalogue = vec![0u8; CATALOGUE_BYTES_MAX - 7];
        let encoded = encode_catalogue(&catalogue).map(|bytes| bytes.len());
        let error = encoded.expect_err("no reader takes it");
        assert_eq!(error.kind(), ErrorKind::Limit);
    }

    #[test]
    fn a_length_that_no_memory_holds_is_refused() {
        let bytes = (1u64 << 60).to_le_bytes();
        assert!(decode_record::<Vec<u64>>(&bytes).is_err());
        assert!(decode_catalogue::<Vec<u64>>(&bytes).is_err());
    }

    #[test]
    fn all_bytes_must_be_used() {
        let mut bytes = Vec::new();
        encode_record(&7u64, &mut bytes).unwrap();
        assert_eq!(decode_record::<u64>(&bytes).unwrap(), 7);
        bytes.push(0);
        let error = decode_record::<u64>(&bytes).unwrap_err();
        assert!(error.to_string().ends_with("1 bytes too many"), "{error}");
        assert!(decode_record::<u64>(&bytes[..7]).is_err());
    }
}
