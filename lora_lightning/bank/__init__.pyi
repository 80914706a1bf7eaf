from .adapter_bank import AdapterBank as AdapterBank
