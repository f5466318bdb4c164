package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/smbios"
	"github.com/guestagent/guestagent/vsockrpc"
)

// The families of OEM strings. See [OEMConfig].
const (
	FamilyAgent   = string(smbios.FamilyAgent)
	FamilySystemd = string(smbios.FamilySystemd)
)

// The VMMs that [PlanBoot] knows.
const (
	VMMQEMU   = "qemu"
	VMMCrosvm = "crosvm"
)

// pullHint is the way out of every limit that the way of OEM strings has.
const pullHint = "leave it out here, and have the guest pull it (guestctl provide)"

const (
	// maxOEMStrings is what the count byte of a structure of type 11 holds.
	// crosvm refuses more, QEMU and cloud-hypervisor count from 0 again.
	maxOEMStrings = 255
	// maxSmallTable is what every firmware takes, and where cloud-hypervisor
	// and crosvm, which write at 0xF0000, come to the end of that region.
	maxSmallTable = 64 << 10
	// maxLargeTable is what Linux on x86 maps of a table, early in the boot.
	maxLargeTable = 256 << 10
	// tableReserve is for what the VMM writes beside the OEM strings.
	tableReserve = 8 << 10
	// maxOldStructure is where systemd before 257 cuts a structure.
	maxOldStructure = 4096
	// maxPID1Pages is how much /run/credentials/@system holds, in pages: a
	// tmpfs of 1 MiB. PID 1 takes no more than that from the host, either.
	maxPID1Pages = 256
	pageSize     = 4096

	// fwCfgPrefix is where PID 1 looks for credentials (import_credentials_qemu
	// in systemd's src/core/import-creds.c), and maxFwCfgName what QEMU takes:
	// FW_CFG_MAX_FILE_PATH, 56, less a NUL.
	fwCfgPrefix  = "opt/io.systemd.credentials/"
	maxFwCfgName = 55
	// maxFwCfgFiles is how many files surely have a place among the 32 that
	// QEMU's fw_cfg has: some 15 are its own, and more with more devices.
	maxFwCfgFiles = 12
)

// An OEMConfig says what a VM gets as OEM strings at its boot.
type OEMConfig struct {
	// Dir and Prefix say which credentials, as for [ReadDir]. Without Dir there
	// are none.
	Dir, Prefix string
	// Family says for whom the credentials are: [FamilyAgent], which is the
	// zero value's, or [FamilySystemd].
	Family string
	// Strings are public ones, as [CheckOEMStrings] takes them. They come first.
	Strings []string
}

// A BootConfig says what [PlanBoot] prepares.
type BootConfig struct {
	OEMConfig
	// VMM is VMMQEMU or VMMCrosvm.
	VMM string
	// Out is the folder for the files. Nothing but strings for QEMU needs none.
	Out string
	// Owner is who runs the VMM, USER or USER:GROUP. If it is empty, that is us.
	Owner string
	// FwCfg gives QEMU the credentials as fw_cfg files, which PID 1 takes and
	// which are no OEM strings. It needs FamilySystemd.
	FwCfg bool
	// LargeTable says that the guest's firmware takes a table of 64 KiB and more.
	LargeTable bool
}

// A Boot is what a VMM is to be given, ready to be written. Its owner wipes it.
type Boot struct {
	// Args are arguments for the VMM. They have no secret.
	Args []string
	// Warnings are for people, a line each.
	Warnings []string

	out, owner string
	files      []bootFile
}

// A bootFile is a file for the VMM to read.
type bootFile struct {
	name  string
	value secret.Value
}

// Wipe wipes the values.
func (b *Boot) Wipe() {
	for _, f := range b.files {
		f.value.Wipe()
	}
}

// An oemString is one that is encoded.
type oemString struct {
	name  string // of the credential; empty if it is a public string
	value secret.Value
}

func (s oemString) String() string {
	if s.name == "" {
		return "a public string"
	}
	return "credential " + s.name
}

func wipeStrings(strs []oemString) {
	for _, s := range strs {
		s.value.Wipe()
	}
}

// CheckOEMStrings reports whether all are strings that may stand on a command
// line and that somebody in the guest understands: printable ASCII, and no
// credential. It does not repeat them: a value may be among them by mistake.
func CheckOEMStrings(strs []string) error {
	for i, s := range strs {
		if err := checkOEMString(s); err != nil {
			return fmt.Errorf("string %d: %w", i+1, err)
		}
	}
	return nil
}

func checkOEMString(s string) error {
	for _, key := range []string{"io.systemd.credential", "io.guestagent.credential"} {
		if strings.HasPrefix(s, key) {
			return errors.New("it begins as a credential does, and every user of this machine can read it here; change the value if it is a secret, put it into a file of a folder, and give that with --dir")
		}
	}
	switch {
	case s == "":
		return errors.New("it is empty")
	case s != strings.TrimSpace(s):
		return errors.New("it begins or ends with white space, which VMMs drop")
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7E {
			return fmt.Errorf("byte %d of %d is not printable ASCII", i+1, len(s))
		}
	}
	v := secret.New([]byte(s))
	defer v.Wipe()
	if _, refused := smbios.Credentials(smbios.Table{Strings: []smbios.String{{Value: v}}}); len(refused) > 0 {
		return errors.New("it begins with io.guestagent. and goes on with nothing that the agent knows; look for a typo, and write io.guestagent.provider:TARGET")
	}
	return nil
}

// credentials reads the credentials. An empty folder is a mistake.
func (c *OEMConfig) credentials() ([]vsockrpc.Credential, error) {
	if c.Dir == "" {
		return nil, nil
	}
	creds, err := ReadDir(c.Dir, c.Prefix)
	switch {
	case errors.As(err, new(*fs.PathError)):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w; %s", err, pullHint)
	case len(creds) > 0:
		return creds, nil
	case c.Prefix != "":
		return nil, fmt.Errorf("reading credentials: no file in %s begins with the prefix", c.Dir)
	}
	return nil, fmt.Errorf("reading credentials: there is no file in %s", c.Dir)
}

// encode makes OEM strings of the public strings and of creds. A value for
// which unfit holds is encoded in base64.
func (c *OEMConfig) encode(creds []vsockrpc.Credential, unfit func([]byte) bool) (strs []oemString, err error) {
	defer func() {
		if err != nil {
			wipeStrings(strs)
			strs = nil
		}
	}()
	if err := CheckOEMStrings(c.Strings); err != nil {
		return nil, err
	}
	for _, s := range c.Strings {
		strs = append(strs, oemString{value: secret.New([]byte(s))})
	}
	family := c.Family
	if family == "" {
		family = FamilyAgent
	}
	for _, cred := range creds {
		v, err := smbios.Credential{
			Name: cred.Name, Family: smbios.Family(family), Binary: unfit != nil && unfit(cred.Value.Bytes()), Value: cred.Value,
		}.OEMString()
		if err != nil {
			return strs, fmt.Errorf("%w; %s", err, pullHint)
		}
		strs = append(strs, oemString{name: cred.Name, value: v})
	}
	return strs, nil
}

// checkStrings reports whether the strings, and size bytes in count others, fit
// a table.
func checkStrings(strs []oemString, count, size, limit int) error {
	var largest oemString
	for _, s := range strs {
		size += s.value.Len() + 1
		count++
		if s.value.Len() >= largest.value.Len() {
			largest = s
		}
	}
	if count > maxOEMStrings {
		return fmt.Errorf("%d OEM strings are more than a VM can have, %d; have the guest pull the credentials (guestctl provide)", count, maxOEMStrings)
	}
	if size > limit-tableReserve {
		return fmt.Errorf("the OEM strings take %d bytes, and %d fit an SMBIOS table of %d KiB beside what else is in it; the largest is %s with %d bytes: %s",
			size, limit-tableReserve, limit>>10, largest, largest.value.Len(), pullHint)
	}
	return nil
}

// checkPID1 reports whether PID 1 has room for the credentials.
func checkPID1(creds []vsockrpc.Credential) error {
	pages, largest := 0, 0
	for i, c := range creds {
		pages += (c.Value.Len() + pageSize - 1) / pageSize
		if c.Value.Len() > creds[largest].Value.Len() {
			largest = i
		}
	}
	if pages <= maxPID1Pages {
		return nil
	}
	return fmt.Errorf("%d credentials take %d KiB of memory, and PID 1 has room for %d KiB and drops the rest; the largest is %s with %d bytes: %s, or give them to the agent (--family guestagent)",
		len(creds), pages*pageSize>>10, maxPID1Pages*pageSize>>10, creds[largest].Name, creds[largest].Value.Len(), pullHint)
}

// warnings are of what depends on the guest.
func (c *OEMConfig) warnings(strs []oemString) []string {
	size := 6
	for _, s := range strs {
		size += s.value.Len() + 1
		if s.name != "" && c.Family == FamilySystemd && size > maxOldStructure {
			return []string{fmt.Sprintf("a guest with systemd before 257 loses credential %s and what comes after it, without a word: PID 1 reads %d bytes of the OEM strings there; --family guestagent does not depend on that",
				s.name, maxOldStructure)}
		}
	}
	return nil
}

// PlanBoot reads credentials and makes arguments and files for a VMM of them.
// It checks what can be checked on the host, and writes nothing: [Boot.Write]
// does. No error has a value.
func PlanBoot(c BootConfig) (b *Boot, err error) {
	switch {
	case c.VMM != VMMQEMU && c.VMM != VMMCrosvm:
		return nil, errors.New("there is no such VMM")
	case c.Family != "" && c.Family != FamilyAgent && c.Family != FamilySystemd:
		return nil, errors.New("there is no such family")
	case c.FwCfg && (c.VMM != VMMQEMU || c.Family != FamilySystemd):
		return nil, errors.New("fw_cfg is between QEMU and PID 1; there is nothing like it for another VMM or for the agent")
	}
	b = &Boot{out: c.Out, owner: c.Owner}
	if c.Out != "" {
		if b.out, err = filepath.Abs(c.Out); err != nil {
			return nil, fmt.Errorf("looking for the folder %q: %w", c.Out, err)
		}
		if strings.ContainsFunc(b.out, func(r rune) bool { return r < 0x20 || r == 0x7F }) {
			return nil, fmt.Errorf("the folder %q has a control character in its path; choose another", b.out)
		}
	}
	creds, err := c.credentials()
	if err != nil {
		return nil, err
	}
	defer Wipe(creds)
	defer func() {
		if err != nil {
			b.Wipe()
			b = nil
		}
	}()
	if c.Family == FamilySystemd {
		if err := checkPID1(creds); err != nil {
			return b, err
		}
	}
	if c.FwCfg {
		if err := b.fwCfg(creds); err != nil {
			return b, err
		}
		creds = nil
	}
	strs, err := c.encode(creds, nil)
	if err != nil {
		return b, err
	}
	limit := maxSmallTable
	if c.LargeTable {
		limit = maxLargeTable
	}
	if err := checkStrings(strs, 0, 0, limit); err != nil {
		wipeStrings(strs)
		if !c.LargeTable && c.VMM == VMMQEMU {
			return b, fmt.Errorf("%w; or say --large-table, if the guest's firmware is UEFI or SeaBIOS 1.17 and QEMU has -machine smbios-entry-point-type=64", err)
		}
		return b, err
	}
	b.Warnings = append(b.Warnings, c.warnings(strs)...)
	if c.VMM == VMMQEMU {
		b.qemu(strs)
	} else {
		b.crosvm(strs)
	}
	if len(b.files) > 0 && b.out == "" {
		return b, errors.New("there is no folder to write the files into")
	}
	return b, nil
}

// path is where a file will be.
func (b *Boot) path(f bootFile) string { return filepath.Join(b.out, f.name) }

// qemuValue quotes a value of a QEMU option.
func qemuValue(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// qemu has a public string on the command line and every other one in a file,
// which is the string, to its last byte.
func (b *Boot) qemu(strs []oemString) {
	for i, s := range strs {
		if s.name == "" {
			b.Args = append(b.Args, "-smbios", "type=11,value="+qemuValue(string(s.value.Bytes())))
			continue
		}
		f := bootFile{name: fmt.Sprintf("oem-%03d", i), value: s.value}
		b.files = append(b.files, f)
		b.Args = append(b.Args, "-smbios", "type=11,path="+qemuValue(b.path(f)))
	}
}

// fwCfg has every credential in a file, as it is.
func (b *Boot) fwCfg(creds []vsockrpc.Credential) error {
	for i, c := range creds {
		name := fwCfgPrefix + c.Name
		if len(name) > maxFwCfgName {
			return fmt.Errorf("credential %s has a name of %d bytes, and fw_cfg takes %d: rename it, leave --fw-cfg out, or %s",
				c.Name, len(c.Name), maxFwCfgName-len(fwCfgPrefix), pullHint)
		}
		f := bootFile{name: fmt.Sprintf("fw-cfg-%03d", i), value: secret.New(bytes.Clone(c.Value.Bytes()))}
		b.files = append(b.files, f)
		b.Args = append(b.Args, "-fw_cfg", "name="+qemuValue(name)+",file="+qemuValue(b.path(f)))
	}
	if len(creds) > maxFwCfgFiles {
		b.Warnings = append(b.Warnings, fmt.Sprintf("QEMU has 32 places for fw_cfg files, takes about half of them for itself, and aborts when %d more do not fit; -global fw_cfg.x-file-slots=N gives it more", len(creds)))
	}
	return nil
}

// crosvmFile is the name of crosvm's configuration file.
const crosvmFile = "crosvm.json"

// crosvm has all strings in a configuration file. They are printable ASCII. It
// is written by hand, since encoding/json would leave copies behind.
func (b *Boot) crosvm(strs []oemString) {
	if len(strs) == 0 {
		return
	}
	const head, tail = `{"smbios": {"oem-strings": [`, "]}}\n"
	size := len(head) + len(tail)
	for _, s := range strs {
		size += 2*s.value.Len() + len(`"", `)
	}
	doc := append(make([]byte, 0, size), head...)
	for i, s := range strs {
		if i > 0 {
			doc = append(doc, ", "...)
		}
		doc = append(doc, '"')
		for _, c := range s.value.Bytes() {
			if c == '"' || c == '\\' {
				doc = append(doc, '\\')
			}
			doc = append(doc, c)
		}
		doc = append(doc, '"')
	}
	wipeStrings(strs)
	f := bootFile{name: crosvmFile, value: secret.New(append(doc, tail...))}
	b.files = append(b.files, f)
	b.Args = append(b.Args, "--cfg", b.path(f))
	b.Warnings = append(b.Warnings, "crosvm has taken a configuration file only until October 2025 (--cfg is experimental before, and gone since); a newer one stops with a usage error, and its guest has to pull (guestctl provide)")
}

// CheckShell reports whether a shell that splits the arguments at white space
// gets them whole, as in $(guestctl boot-args …).
func (b *Boot) CheckShell() error {
	for i, arg := range b.Args {
		if j := strings.IndexAny(arg, " \t\n*?[\\"); j >= 0 {
			return fmt.Errorf("argument %d has %q in it, which a shell does not leave alone; choose another --out or string, or print with --print0", i+1, arg[j])
		}
	}
	return nil
}
