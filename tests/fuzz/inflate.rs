//! Inflating raw deflate streams (RFC 1951), for `qcow2`: bit by bit, short rather than fast.
//!
//! Promises: `None` for a stream that is damaged or cut short; never more than asked for.

/// Lengths of codes 257 to 285: base, and extra bits.
const LENGTHS: [(u16, u32); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// In which order the lengths of the code of code lengths come.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// A stream being read.
struct Stream<'a> {
    /// Its bytes.
    bytes: &'a [u8],
    /// Bits read so far.
    position: usize,
}

impl Stream<'_> {
    /// The next bits, the first one lowest.
    fn bits(&mut self, count: u32) -> Option<usize> {
        let mut value = 0;
        for bit in 0..count {
            let byte = self.bytes.get(self.position / 8)?;
            value |= usize::from(byte >> (self.position % 8) & 1) << bit;
            self.position += 1;
        }
        Some(value)
    }

    /// The next symbol of a code.
    fn symbol(&mut self, code: &Code) -> Option<usize> {
        let (mut value, mut first, mut index) = (0, 0, 0);
        for count in &code.counts[1..] {
            value |= self.bits(1)?;
            if value < first + count {
                return code.symbols.get(index + value - first).copied();
            }
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        None
    }
}

/// A Huffman code.
struct Code {
    /// How many symbols have codes of each length.
    counts: [usize; 16],
    /// The symbols by length, then by value.
    symbols: Vec<usize>,
}

impl Code {
    /// The code whose symbols have these lengths; `None` if those make no code: too many, or not
    /// enough to give every row of bits a meaning, unless there is only one symbol or none.
    fn new(lengths: &[usize]) -> Option<Self> {
        let mut counts = [0; 16];
        lengths.iter().for_each(|len| counts[*len] += 1);
        let of = |len: usize| (0..lengths.len()).filter(move |symbol| lengths[*symbol] == len);
        counts[0] = 0;
        let symbols: Vec<usize> = (1..16).flat_map(of).collect();
        let used: usize = (1..16).map(|len| counts[len] << (15 - len)).sum();
        (used == 1 << 15 || symbols.len() < 2).then_some(Self { counts, symbols })
    }
}

/// What the beginning of a stream inflates to.
pub struct Inflated {
    /// As many bytes as were asked for.
    pub bytes: Vec<u8>,
    /// Whether the stream ends there. What follows otherwise may not make any sense.
    pub is_whole: bool,
}

/// The first `len` bytes of what `bytes` inflates to.
pub fn inflate(bytes: &[u8], len: usize) -> Option<Inflated> {
    let mut stream = Stream { bytes, position: 0 };
    let mut out = Vec::new();
    loop {
        let last = stream.bits(1)? == 1;
        let ended = match stream.bits(2)? {
            0 => stored(&mut stream, &mut out).map(|()| true)?,
            1 => {
                let long = (0..288).map(|symbol| match symbol {
                    0..144 => 8,
                    144..256 => 9,
                    256..280 => 7,
                    _ => 8,
                });
                let literals = Code::new(&long.collect::<Vec<_>>())?;
                block(&mut stream, &mut out, &literals, &Code::new(&[5; 32])?, len)?
            }
            2 => {
                let (literals, distances) = codes(&mut stream)?;
                block(&mut stream, &mut out, &literals, &distances, len)?
            }
            _ => return None,
        };
        if out.len() >= len {
            let is_whole = last && ended && out.len() == len;
            out.truncate(len);
            return Some(Inflated { bytes: out, is_whole });
        }
        if last {
            return None;
        }
    }
}

/// Copies a block that is stored.
fn stored(stream: &mut Stream<'_>, out: &mut Vec<u8>) -> Option<()> {
    stream.position = stream.position.next_multiple_of(8);
    let (len, check) = (stream.bits(16)?, stream.bits(16)?);
    if len != !check & 0xffff {
        return None;
    }
    let start = stream.position / 8;
    out.extend(stream.bytes.get(start..start + len)?);
    stream.position += len * 8;
    Some(())
}

/// Reads the two codes of a block.
fn codes(stream: &mut Stream<'_>) -> Option<(Code, Code)> {
    let (literals, distances) = (stream.bits(5)? + 257, stream.bits(5)? + 1);
    let count = stream.bits(4)? + 4;
    let mut lengths = vec![0; 19];
    for place in &ORDER[..count] {
        lengths[*place] = stream.bits(3)?;
    }
    let code = Code::new(&lengths)?;
    let mut lengths = Vec::new();
    while lengths.len() < literals + distances {
        let (value, times) = match stream.symbol(&code)? {
            16 => (*lengths.last()?, 3 + stream.bits(2)?),
            17 => (0, 3 + stream.bits(3)?),
            18 => (0, 11 + stream.bits(7)?),
            len => (len, 1),
        };
        lengths.resize(lengths.len() + times, value);
    }
    // A block cannot end without symbol 256.
    if lengths.len() > literals + distances || literals > 286 || lengths[256] == 0 {
        return None;
    }
    Some((Code::new(&lengths[..literals])?, Code::new(&lengths[literals..])?))
}

/// Inflates a block, up to `most` bytes in all. Returns whether it ends there.
fn block(
    stream: &mut Stream<'_>,
    out: &mut Vec<u8>,
    literals: &Code,
    distances: &Code,
    most: usize,
) -> Option<bool> {
    while out.len() < most {
        match stream.symbol(literals)? {
            literal @ 0..256 => out.push(u8::try_from(literal).ok()?),
            256 => return Some(true),
            code => {
                let (base, extra) = LENGTHS.get(code - 257)?;
                let len = usize::from(*base) + stream.bits(*extra)?;
                let code = stream.symbol(distances)?;
                let extra = u32::try_from(code / 2).ok()?.saturating_sub(1);
                let base = if code < 4 { code } else { (2 + code % 2) << extra };
                let distance = 1 + base + stream.bits(extra)?;
                let start = out.len().checked_sub(distance).filter(|_| code < 30)?;
                (start..start + len).for_each(|at| out.push(out[at]));
            }
        }
    }
    Some(stream.symbol(literals) == Some(256))
}
